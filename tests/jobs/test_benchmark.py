import json

from jobs.benchmark import main


def test_models_are_measured_against_the_plain_way_and_agree_with_it(tmp_path, capsys):
    path = tmp_path / "models.json"
    arguments = ["--model", "biomedclipseg", "--model", "unet_d", "--repeats", "1", "--json", str(path)]
    assert main(["models", *arguments]) == 0
    report = json.loads(path.read_text())
    assert [speed["name"] for speed in report["models"]] == ["biomedclipseg", "unet_d"]
    assert report["cpu"]
    for speed in report["models"]:
        assert speed["largest_difference"] < 1e-4  # padding computed or not, batch norms folded or not
    assert "biomedclipseg" in capsys.readouterr().out
