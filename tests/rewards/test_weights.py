"""Every way in which a checkpoint can be wrong is one line that says what to do."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.rewards.tiny import OPEN_CLIP, hf_clip, open_clip_folder, reward
from twinrl.config.errors import InputError


def message(value, **options):
    with pytest.raises(InputError) as error:
        reward(value, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_file(saved, tmp_path):
    text = message({"kind": "hpsv2", "checkpoint": str(tmp_path / "no.pt")}, key="rewards.hps")
    assert "rewards.hps.checkpoint is no file" in text
    assert "HPS_v2.1_compressed.pt" in text


def test_truncated_file(saved, tmp_path):
    whole = Path(saved["hpsv2"]["checkpoint"]).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    text = message({"kind": "hpsv2", **saved["hpsv2"], "checkpoint": str(tmp_path / "cut.pt")})
    assert "cannot be read as weights" in text
    assert "download it again" in text


def test_empty_file(saved, tmp_path):
    (tmp_path / "empty.pt").touch()
    assert "(0 bytes)" in message({"kind": "hpsv2", **saved["hpsv2"], "checkpoint": str(tmp_path / "empty.pt")})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_not_run(saved, tmp_path):
    class Exploit:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Exploit()}))
    text = message({"kind": "hpsv2", **saved["hpsv2"], "checkpoint": str(tmp_path / "evil.pt")})
    assert "cannot be read as weights" in text
    assert not (tmp_path / "ran").exists()


def test_other_architecture_names_the_first_keys(saved, tmp_path):
    vision = {**OPEN_CLIP["vision_cfg"], "layers": 3}
    deeper = open_clip_folder(tmp_path / "deeper", vision_cfg=vision)
    text = message({"kind": "hpsv2", **saved["hpsv2"], "architecture": deeper})
    assert "12 missing (visual.transformer.resblocks.2." in text
    narrow = open_clip_folder(tmp_path / "narrow", embed_dim=16)
    text = message({"kind": "hpsv2", **saved["hpsv2"], "architecture": narrow})
    assert "text_projection (32, 32) instead of (32, 16)" in text


def test_file_without_state_dict(saved, tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    text = message({"kind": "hpsv2", **saved["hpsv2"], "checkpoint": str(tmp_path / "other.pt")})
    assert "no entry 'state_dict'; got model" in text


def test_foreign_names_are_unexpected(saved, tmp_path):
    torch.save({"backbone.weight": torch.zeros(2)}, tmp_path / "foreign.pt")
    text = message({"kind": "imagereward", **saved["imagereward"], "checkpoint": str(tmp_path / "foreign.pt")})
    assert "1 unexpected (backbone.weight)" in text
    assert "missing" in text


def test_unknown_architecture(saved):
    text = message({"kind": "hpsv2", **saved["hpsv2"], "architecture": "ViT-XXL-1"}, key="rewards.hps")
    assert text.startswith("rewards.hps.architecture 'ViT-XXL-1' is no open_clip model")


def test_head_of_another_tower(saved, tmp_path):
    hf_clip(projection=16).save_pretrained(tmp_path / "clip")
    text = message({"kind": "aesthetic", **saved["aesthetic"], "tower": str(tmp_path / "clip")})
    assert "layers.0.weight (1024, 24) instead of (1024, 16)" in text


class TestFolders:
    """CLIPModels in transformers' format, where from_pretrained alone would only warn."""

    def copy(self, saved, tmp_path):
        return shutil.copytree(saved["pickscore"]["checkpoint"], tmp_path / "clip")

    def test_no_folder(self, tmp_path):
        text = message({"kind": "pickscore", "checkpoint": str(tmp_path)}, key="rewards.pick")
        assert "rewards.pick.checkpoint has no config.json" in text

    def test_missing_weight(self, saved, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = self.copy(saved, tmp_path)
        weights = load_file(folder / "model.safetensors")
        del weights["logit_scale"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert "1 missing (logit_scale)" in message({"kind": "pickscore", "checkpoint": str(folder)})

    def test_truncated(self, saved, tmp_path):
        folder = self.copy(saved, tmp_path)
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-100])
        text = message({"kind": "pickscore", "checkpoint": str(folder)})
        assert "cannot be read as a CLIP model" in text

    def test_other_sizes(self, saved, tmp_path):
        folder = self.copy(saved, tmp_path)
        hf_clip(projection=16).config.save_pretrained(folder)
        text = message({"kind": "pickscore", "checkpoint": str(folder)})
        assert "2 of another shape" in text
        assert "visual_projection.weight (24, 32) instead of (16, 32)" in text


@pytest.mark.parametrize(
    ("kind", "what", "setting"),
    [
        ("hpsv2", "HPS_v2.1_compressed.pt of xswu/HPSv2", "checkpoint"),
        ("pickscore", "yuvalkirstain/PickScore_v1", "checkpoint"),
        ("imagereward", "ImageReward.pt of THUDM/ImageReward", "checkpoint"),
        ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth", "checkpoint"),
    ],
)
def test_offline_says_where_it_looked_and_what_to_set(monkeypatch, tmp_path, kind, what, setting):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    text = message({"kind": kind}, key="rewards.hps")
    assert what in text
    assert str(tmp_path) in text
    assert f"set rewards.hps.{setting}=PATH" in text
