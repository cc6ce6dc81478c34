"""``dist-asgd plan``: its text, its JSON document, its errors and exit statuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dist_asgd import plan
from dist_asgd.cli import app
from tests.planning.test_plan import LLAMA_7B


def cli(*args: str, status: int = 0) -> Result:
    """Run the command in this process, and check its exit status."""
    result = CliRunner().invoke(app, ["plan", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def test_the_command_prints_what_the_function_returns() -> None:
    """As a table and as JSON."""
    expected = plan("100M", ranks=16, gpu_memory="80GiB", activations="4GiB", mesh=(4, 4), ranks_per_node=4)
    args = ("100M", "--ranks", "16", "--gpu-memory", "80GiB", "--activations", "4GiB", "--mesh", "4x4")
    args += ("--ranks-per-node", "4")
    assert cli(*args).stdout == f"{expected}\n"
    assert json.loads(cli(*args, "--json").stdout) == json.loads(json.dumps(expected.as_dict()))


def test_options_arrive() -> None:
    """Those of dtypes, buckets and backends."""
    options = "--dtype bfloat16 --average-dtype bfloat16 --master-weights --reduce-dtype float32 --backend gloo"
    args = ("100M", "-n", "8", *options.split(), "--bucket-cap-mb", "50", "--no-gradient-as-bucket-view", "--fused")
    found = json.loads(cli(*args, "--json").stdout)
    assert found["backend"] == "gloo"
    assert found["rows"][1]["precision"] == "bfloat16, masters, ax bfloat16, sent in float32"
    assert found["rows"][1]["bytes"]["passing"] == found["rows"][1]["bytes"]["gradients"]


def test_links_arrive() -> None:
    """The table of times, and the same in JSON."""
    links = {"link_gbit": 25.0, "latency_us": 7.0, "node_gbit": 300.0, "node_latency_us": 2.0, "host_gbit": 90.0}
    args = ["100M", "-n", "16", "--compute-ms", "12.5"]
    for name, value in links.items():
        args += [f"--{name.replace('_', '-')}", f"{value}"]
    expected = plan("100M", ranks=16, compute_ms=12.5, **links)  # type: ignore[arg-type]
    assert cli(*args).stdout == f"{expected}\n"
    found = json.loads(cli(*args, "--json").stdout)
    assert found["links"] == links
    assert found["rows"][2]["time"]["compute"] == 0.0125


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (("nothing/here", "-n", "8"), 1, "does not exist, and is no number of parameters"),
        (("0", "-n", "8"), 1, "wanted a positive number"),
        (("7B", "-n", "0"), 1, "must be a whole number of at least 1"),
        (("7B", "-n", "12", "--ranks-per-node", "8"), 1, "does not divide 12 ranks"),
        (("7B", "-n", "8", "--mesh", "2x3"), 1, "has 6 ranks, and there are 8"),
        (("7B", "-n", "8", "--mesh", "8"), 1, "such as 4x8"),
        (("7B", "-n", "8", "--gpu-memory", "lots"), 1, "80GiB"),
        (("7B", "-n", "8", "--master-weights"), 1, "master_weights=True"),
        (("7B", "-n", "16", "--compute-ms", "5"), 1, "Give link_gbit (--link-gbit)"),
        (("7B",), 2, "--ranks"),
        (("7B", "-n", "eight"), 2, "valid integer"),
        (("7B", "-n", "8", "--dtype", "int8"), 2, "int8"),
    ],
)
def test_errors_say_what_to_do(args: tuple[str, ...], status: int, text: str) -> None:
    """On one line of standard error if the command raises them, and nothing on standard output."""
    result = cli(*args, status=status)
    assert result.stdout == ""
    assert text in result.stderr
    if status == 1:
        assert len(result.stderr.splitlines()) == 1


def test_names_from_files_move_no_cursor(tmp_path: Path) -> None:
    """Control characters in a path are escaped."""
    path = tmp_path / "\x1b[31mconfig.json"
    path.write_text(
        '{"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8, "vocab_size": 9}'
    )
    found = cli(str(path), "-n", "2").stdout
    assert "\x1b" not in found
    assert "[bold]" not in found


def test_the_page_shows_what_the_command_prints() -> None:
    """The same tables, modes and reasons. Figures may be those of an earlier version, as long as they are close."""
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    shown = page.split("$ dist-asgd plan config.json --ranks 16 --gpu-memory 80GiB --activations 20GiB\n")[1]
    config = {**LLAMA_7B, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    found = plan({**config, "dtype": "bfloat16"}, ranks=16, gpu_memory="80GiB", activations="20GiB")
    lines = shown.split("```")[0].splitlines()
    for line, printed in zip(lines[1:], str(found).splitlines()[1:], strict=True):
        assert re.sub(r"[\d.,]+ \w+|\d[\d.,]*| +|─+", " ", line) == re.sub(r"[\d.,]+ \w+|\d[\d.,]*| +|─+", " ", printed)
    for row in found.rows:
        (line,) = (line for line in lines if re.match(rf"{row.mode}( \*)? .*(yes|no|tight)$", line))
        assert float(line.split()[-3]) * 2**30 == pytest.approx(row.total_bytes, rel=0.1)
