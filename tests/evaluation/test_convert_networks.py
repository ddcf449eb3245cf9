"""`convert --inception` and `--lpips`."""

import eval_case
import pytest
import torch_files

from mvar_jax.__main__ import main
from mvar_jax.evaluation.inception_weights import load_inception


def test_convert_writes_one_file_and_says_what_it_read(tmp_path, capsys, inception_pth):
    out = tmp_path / "models" / "inception.npz"
    assert main(["convert", "--inception", str(inception_pth), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    (sha256,) = load_inception(out).sources.values()
    assert f"read inception.pth, SHA-256 {sha256}\n" in printed
    assert "not the published file" in printed and f"wrote {out}\n" in printed
    torch_files.save(tmp_path / "vgg.pth", eval_case.vgg_state())
    torch_files.save(tmp_path / "heads.pth", eval_case.heads_state())
    files = [str(tmp_path / name) for name in ("vgg.pth", "heads.pth")]
    assert main(["convert", "--lpips", *files, "--out", str(tmp_path / "lpips.npz")]) == 0
    assert (tmp_path / "lpips.npz").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--inception", "x.pth"], "give --out, the .npz file to write"),
        (["--inception", "x.pth", "--out", "x.npz", "--tokenizer", "y"], "--tokenizer cannot be combined with --inc"),
        (["--lpips", "x", "y", "--inception", "x.pth"], "--lpips cannot be combined with --inception"),
        (["--lpips", "x", "y", "--to_torch", "z"], "--to_torch cannot be combined with --lpips"),
        (["--inception", "OUT/x.pth", "--out", "OUT/x.npz"], "x.pth is missing: download pt_inception-"),
        (["--inception", "OUT/x.pth", "--out", "OUT/model"], "out must be a new file that ends in .npz, got "),
        (["--lpips", "x", "y", "--out", "OUT/taken.npz"], "taken.npz, which exists"),
    ],
)
def test_refusals_are_one_sentence(tmp_path, capsys, options, message):
    (tmp_path / "taken.npz").write_text("")
    assert main(["convert", *(text.replace("OUT", str(tmp_path)) for text in options)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken.npz"]
