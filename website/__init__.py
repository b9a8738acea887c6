"""The site: what ``make docs`` makes of the pages, the code and the notebooks. mkdocs.yml names its parts."""
