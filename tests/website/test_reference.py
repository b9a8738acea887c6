"""Reference pages that are made from the code leave nothing out."""

from website import reference


def test_every_metric_has_a_meaning() -> None:
    found = dict(reference.metric_names())
    assert [name for name, meaning in found.items() if not meaning] == []
    assert {"loss/total", "grad/<term>/<quantity>", "val/<quantity>", "event/<kind>"} <= set(found)


def test_every_command_and_key_is_told() -> None:
    commands, configuration = reference.commands(), reference.configuration()
    for name in ("train", "data prepare", "ablate run", "analyze", "notebook", "import-simpletuner"):
        assert f"## `twinrl {name}`" in commands
    for key in ("train.steps", "evaluation.every", "stability.capsules.every", "buckets.area"):
        assert f"| `{key}` |" in configuration
    for kind in ("rectify", "barron", "lab_hps", "zclip"):
        assert f"#### `{kind}`" in configuration
