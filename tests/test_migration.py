"""The files of docs/migration.md go on exactly where the old optimizer would have gone."""

import re
from pathlib import Path

import pytest
import torch

from tests.test_readme import ROOT, Script, run_script, scripts

# Written before the last line of a file: the parameters, and the averages that an expression gives.
KEEP = """
whole = lambda tensor: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
kept_parameters = [whole(parameter) for parameter in model.parameters()]
kept_averages = [whole(ax) for ax in {averages}]
if dist.get_rank() == 0:
    import torch
    torch.save([kept_parameters, kept_averages], "{file}")
dist.destroy_process_group()
"""
OF_ASGD = "[state['ax'] for state in optimizer.state_dict()['state'].values()]"
OF_SHARDED = "[state['ax'] for state in optimizer.consolidated_state_dict(to=0).get('state', {}).values()]"

# Section of the page: the averages of its old optimizer.
SECTIONS = {
    "asgd": OF_ASGD,
    "zero": f"([] if dist.get_rank() else {OF_ASGD})",
    "fsdp2": "[optimizer.state[parameter]['ax'] for parameter in model.parameters()]",
    "averaged": "averaged.module.parameters()",
    "awd": OF_ASGD,
}


@pytest.fixture(scope="module")
def files() -> dict[str, Script]:
    """The files of the page by name."""
    return {script.name: script for script in scripts(ROOT / "docs" / "migration.md")}


def write(folder: Path, script: Script, averages: str, name: str, last_step: int) -> None:
    """Write a file so that its last loop ends after ``last_step`` steps, and that it keeps what it has then."""
    *others, last = re.findall(r"range\(.*?\d+\)", script.text)
    assert not others or others[-1] != last
    text = script.text.replace(last, re.sub(r"\d+\)$", f"{last_step})", last))
    head, end, _ = text.rpartition("dist.destroy_process_group()\n")
    assert end
    (folder / script.name).write_text(head + KEEP.format(averages=averages, file=name))


@pytest.mark.parametrize("section", SECTIONS)
def test_a_taken_over_checkpoint_goes_on_as_before(tmp_path: Path, files: dict[str, Script], section: str) -> None:
    """Parameters and averages after 40 steps, of which 20 are the old optimizer's, against 40 of the old one."""
    (tmp_path / "job.py").write_text(files["job.py"].text)
    before, after = files[f"{section}_before.py"], files[f"{section}_after.py"]
    for folder, last_step in (("old", 40), (".", 20)):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "job.py").write_text(files["job.py"].text)
        write(place, before, SECTIONS[section], "before.kept", last_step)
        run_script(before, place)
    # The average beside an optimizer has a state of its own.
    averages = OF_SHARDED.replace("optimizer.", "average.") if section == "averaged" else OF_SHARDED
    write(tmp_path, after, averages, "after.kept", 40)
    run_script(after, tmp_path)
    expected = torch.load(tmp_path / "old" / "before.kept")
    actual = torch.load(tmp_path / "after.kept")
    assert len(expected[0]) == len(expected[1]) == 4
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    # AveragedModel divides on CPUs, where the form of several tensors, the default here, multiplies by a reciprocal.
    tolerance = 1e-6 if section == "averaged" else 0
    torch.testing.assert_close(actual[1], expected[1], rtol=tolerance, atol=tolerance)
    assert not torch.equal(actual[0][0], actual[1][0]), "nothing was averaged"


def test_one_optimizer_is_awd_lstms_two(tmp_path: Path, files: dict[str, Script]) -> None:
    """SGD and then ASGD have the bits of one ShardedASGD whose averaging starts in between."""
    (tmp_path / "job.py").write_text(files["job.py"].text)
    for name, averages in (("awd_before.py", OF_ASGD), ("awd_new.py", OF_SHARDED)):
        write(tmp_path, files[name], averages, f"{name}.kept", 20)
        run_script(files[name], tmp_path)
    expected, actual = (torch.load(tmp_path / f"{name}.kept") for name in ("awd_before.py", "awd_new.py"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
