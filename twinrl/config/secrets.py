"""Passwords and tokens in addresses, which go to no file and on no screen."""

import re

SECRETS = "password|passwd|passphrase|pwd|token|secret|api[_-]?key|access[_-]?key|credential|authorization|signature"
"""What the name of a secret in a query holds; Azure calls its own ``sig``."""
TOKENS = "gh[pousr]_|github_pat_|glpat-|dapi|hf_|xox[a-z]-|eyJ"
"""How tokens begin that stand in the place of a user, without a colon: GitHub's, GitLab's, Databricks', …"""
SECRET = re.compile(
    rf"(://(?:[^/@\s:]*:(?!\d+(?:[/?#\s]|$))|(?={TOKENS})))\S+(?=@)"
    rf"|([?&;#](?:sig|[\w-]*(?:{SECRETS})[\w-]*)=)(?!\*\*\*)[^&;#\s]+",
    re.IGNORECASE,
)
"""The part of a URI before the last @ that is no port, whatever characters people have in it; and of its query."""


def shown(text: str) -> str:
    """A text in which no URI's password or token is left: it goes to files and screens."""
    return SECRET.sub(lambda found: f"{found[1] or found[2]}***", text)
