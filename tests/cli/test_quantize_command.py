import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import Result

from golden.checkpoint import Checkpoint, reconstruct
from golden.errors import InputError
from golden.formats import HIF8T
from golden.layer import parse_recipe, quantize_layer
from golden.metrics import measure
from sop.commands.quantize import quantize
from sop.files.models import open_model
from sop.quantizing.quantization import quantize_model
from sop.quantizing.settings import EFFORTS, Override, Settings
from sop.quantizing.settings_keys import KEYS, merged_settings, settings_of
from sop.quantizing.workers import Workers
from tests.support.commands import invoke_or_raise

FORMAT = "BOF4-NF4sS1E5M5"
SHAPES = {
    "embed_tokens.weight": (40, 32),
    "model.layers.0.attn.q_proj.weight": (32, 32),
    "model.layers.0.mlp.up_proj.weight": (64, 32),
    "model.layers.0.norm.weight": (32,),
    "model.layers.1.attn.q_proj.weight": (32, 32),
    "model.layers.1.mlp.up_proj.weight": (64, 32),
}
LINEAR = [name for name in SHAPES if "_proj" in name]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    tensors = {
        # Layers of different sizes, so that they are not all alike.
        name: (0.02 * (1 + number) * rng.standard_normal(shape)).astype(np.float32)
        for number, (name, shape) in enumerate(SHAPES.items())
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


def invoke(*arguments: object) -> Result:
    result = invoke_or_raise("quantize", *arguments)
    assert result.exit_code == 0
    return result


def run(*arguments: object) -> str:
    return invoke(*arguments).stdout


def weights_of(path: Path, name: str) -> NDArray[np.float32]:
    with open_model(path) as model:
        return model.read(name)


# ------------------------------------------------------------------------------------- one format


def test_every_linear_weight_gets_the_format_and_the_rest_stays(source: Path) -> None:
    output = source.with_name("out.safetensors")
    found = json.loads(run(source, "-o", output, "-f", FORMAT, "-j", 1, "--json"))
    original = load_file(source)
    with Checkpoint(output) as checkpoint:
        assert sorted(checkpoint.names) == sorted(LINEAR)
        assert sorted(checkpoint.raw_names) == sorted(set(SHAPES) - set(LINEAR))
        for name in checkpoint.raw_names:
            np.testing.assert_array_equal(checkpoint.read_raw(name), original[name])
        for name in LINEAR:
            layer = quantize_layer(original[name], parse_recipe(FORMAT, HIF8T))
            np.testing.assert_array_equal(reconstruct(checkpoint.read(name)), layer.reconstruct())
        assert found["bits_per_weight"] == float(checkpoint.stored_bits_per_weight)
        assert checkpoint.config["source"]["file"] == "model.safetensors"
    by_name = {layer["name"]: layer for layer in found["layers"]}
    for name in LINEAR:
        layer = quantize_layer(original[name], parse_recipe(FORMAT, HIF8T))
        expected = measure(original[name], layer.reconstruct())
        assert by_name[name]["gap_ppm"] == expected.gap_ppm
    assert not output.with_name("out.safetensors.parts").exists()


def test_patterns_choose_tensors(source: Path) -> None:
    output = source.with_name("out.safetensors")
    run(source, "-o", output, "-f", FORMAT, "-j", 1, "--include", "*", "--exclude", "*.0.*")
    with Checkpoint(output) as checkpoint:
        assert sorted(checkpoint.names) == ["embed_tokens.weight", *LINEAR[2:]]


def test_sparse_corrections_are_stored(source: Path) -> None:
    output = source.with_name("out.safetensors")
    run(source, "-o", output, "-f", FORMAT, "-j", 1, "--opq", 0.01, "--wr", 0.01)
    with Checkpoint(output) as checkpoint:
        for name in LINEAR:
            corrections = checkpoint.read(name).corrections
            assert corrections is not None
            assert corrections.entries > 0.01 * np.prod(SHAPES[name])


# ------------------------------------------------------------------------------------ calibration


def write_calibration(
    source: Path, arrays: Mapping[str, NDArray[np.floating]], **changes: object
) -> Path:
    """Statistics by layer; names ending in `.second_moment` make it one with second moments."""
    path = source.with_name("stats.safetensors")
    with open_model(source) as model:
        sha256 = model.fingerprint()
    layers = [name.rpartition(".")[0] for name in arrays]
    description = {
        "version": 2, "model": "m", "model_sha256": sha256, "config_sha256": "", "text": "t",
        "text_sha256": "", "skip_tokens": 0, "tokens": 7, "window": 7, "prefix_tokens": [],
        "second_moment": any(name.endswith(".second_moment") for name in arrays), "software": "",
        "layers": {name: name for name in layers}, "layer_tokens": dict.fromkeys(layers, 7),
        "uncovered": {}, **changes,
    }  # fmt: skip
    save_file(dict(arrays), path, {"sop_calibration": json.dumps(description)})
    return path


def statistics(name: str, seed: int) -> dict[str, NDArray[np.floating]]:
    mixed = np.random.default_rng(seed).standard_normal((6, 32))
    moment = mixed.T @ mixed + 0.1 * np.eye(32)
    norms = np.sqrt(np.diag(moment))
    return {f"{name}.channel_norms": norms, f"{name}.second_moment": moment.astype(np.float32)}


@pytest.mark.parametrize("feedback", [True, False])
def test_statistics_are_used_where_there_are_some(source: Path, feedback: bool) -> None:
    arrays = statistics(LINEAR[1], 3)
    stats = write_calibration(source, arrays)
    output = source.with_name("out.safetensors")
    options = ["--feedback"] if feedback else []  # off unless asked for
    found = json.loads(
        run(source, "-o", output, "-f", FORMAT, "-j", 1, "-c", stats, *options, "--json")
    )
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert [name for name in LINEAR if layers[name]["calibrated"]] == [LINEAR[1]]
    assert (layers[LINEAR[1]]["feedback"] is not None) == feedback
    assert layers[LINEAR[0]]["feedback"] is None
    norms, moment = arrays.values()
    weights = load_file(source)
    for name, c, h in ((LINEAR[0], None, None), (LINEAR[1], norms, moment if feedback else None)):
        layer = quantize_layer(weights[name], parse_recipe(FORMAT, HIF8T), c, h)
        with Checkpoint(output) as checkpoint:
            np.testing.assert_array_equal(reconstruct(checkpoint.read(name)), layer.reconstruct())
            assert checkpoint.calibration is not None
    text = run(source, "-o", output, "-f", FORMAT, "-j", 1, "-c", stats, *options)
    assert "3 tensors are not in the calibration" in text
    assert ("error feedback in 1 of 4 tensors" in text) == feedback


def test_statistics_of_another_model_are_refused(source: Path) -> None:
    stats = write_calibration(source, statistics("blk.0.x", 4))
    message = r"stats\.safetensors: knows none of these tensors of .* such as 'blk\.0\.x'"
    with pytest.raises(InputError, match=message):
        run(source, "-f", FORMAT, "-c", stats, "-o", source.with_name("out.safetensors"))


def test_statistics_of_other_weights_need_to_be_allowed(source: Path) -> None:
    stats = write_calibration(source, statistics(LINEAR[1], 3), model_sha256="ab" * 32)
    output = source.with_name("out.safetensors")
    options = [source, "-f", FORMAT, "-j", 1, "-c", stats, "-o", output]
    message = r"stats\.safetensors: field 'model_sha256': statistics of other weights than .*model"
    with pytest.raises(InputError, match=message):
        run(*options)
    assert not list(source.parent.glob("out*"))
    run(*options, "--allow-other-calibration")
    assert output.exists()


def test_few_tokens_are_warned_of(source: Path) -> None:
    arrays = statistics(LINEAR[1], 3)
    stats = write_calibration(source, arrays, tokens=255)
    done = invoke(source, "-f", FORMAT, "-c", stats, "--dry-run")
    assert "stats.safetensors: only 255 tokens: the statistics are those of a few" in done.stderr
    assert "1 of 1 second moments have fewer tokens than channels" in done.stderr
    stats = write_calibration(source, arrays, tokens=256, layer_tokens={LINEAR[1]: 256})
    assert "warning" not in invoke(source, "-f", FORMAT, "-c", stats, "--dry-run").stderr


def test_statistics_of_another_shape_are_named(source: Path) -> None:
    arrays = {f"{LINEAR[0]}.channel_norms": np.ones(31)}
    stats = write_calibration(source, arrays)
    message = rf"model\.safetensors: tensor '{LINEAR[0]}': .*\(31,\)"
    with pytest.raises(InputError, match=message):
        run(source, "-f", FORMAT, "-j", 1, "-c", stats, "-o", source.with_name("out.safetensors"))


# ------------------------------------------------------------------------------------ bit budgets


def test_a_budget_is_kept_and_spent(source: Path) -> None:
    output = source.with_name("out.safetensors")
    found = json.loads(run(source, "-o", output, "--bpw", 8, "--effort", "fast", "--json"))
    # Row scales and LUTs weigh heavily on layers this small.
    assert 7.5 < found["bits_per_weight"] <= 8.0
    formats = {layer["format"] for layer in found["layers"]}
    assert len(formats) > 1
    with Checkpoint(output) as checkpoint:
        plan = checkpoint.config["plan"]
        chosen = {layer["name"]: layer["chosen"] for layer in plan["layers"]}
        assert plan["bits"] == sum(checkpoint.bits(name) for name in LINEAR)
        for layer in plan["layers"]:
            assert layer["chosen"] in [option["name"] for option in layer["options"]]
            assert sum(option.get("on_hull", True) for option in layer["options"]) > 1
        assert plan["bits"] <= plan["budget_bits"] == 8 * sum(np.prod(SHAPES[n]) for n in LINEAR)
        for name in LINEAR:
            wanted = parse_recipe(chosen[name], HIF8T).format
            assert checkpoint.info(name).format.word == wanted.word


def test_corrections_are_within_the_budget(source: Path) -> None:
    settings = replace(WITH_BUDGET, bits_per_weight="7", outliers=0.02, residuals=0.02)
    output = source.with_name("out.safetensors")
    quantize_model(source, LINEAR, output, settings)
    with Checkpoint(output) as checkpoint:
        assert 5 < checkpoint.stored_bits_per_weight <= 7
        assert checkpoint.read(LINEAR[0]).corrections is not None


def test_a_budget_that_cannot_be_met_says_what_can(source: Path) -> None:
    with pytest.raises(InputError, match=r"smallest choice takes"):
        _quantize(source, Settings(bits_per_weight="3", effort="fast"))


def _quantize(source: Path, settings: Settings, **options: Any) -> bytes:
    output = source.with_name("direct.safetensors")
    quantize_model(source, LINEAR, output, settings, **options)
    return output.read_bytes()


# ---------------------------------------------------------------------------- settings from a file


def test_a_file_gives_settings_and_overrides(source: Path) -> None:
    config = source.with_name("settings.toml")
    config.write_text(
        f"format = '{FORMAT}'\nopq = 0.01\n"
        "[[override]]\nmatch = '*.q_proj.*'\nformat = 'E2M3sUE4M4'\n"
        "[[override]]\nmatch = '*.layers.1.*'\nformat = 'keep'\n"
    )
    output = source.with_name("out.safetensors")
    run(source, "-o", output, "--config", config, "-j", 1, "--opq", 0)
    with Checkpoint(output) as checkpoint:
        formats = {name: checkpoint.info(name).format.name for name in checkpoint.names}
        assert formats == {
            LINEAR[0]: "E2M3sUE4M4", LINEAR[1]: FORMAT, LINEAR[2]: "E2M3sUE4M4"
        }  # fmt: skip
        assert LINEAR[3] in checkpoint.raw_names
        assert checkpoint.read(LINEAR[1]).corrections is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("format = ", "not TOML"),
        ("formt = 'x'", "unknown key 'formt'"),
        ("opq = true", "opq: True is of the wrong type"),
        ("feedback = 1", "feedback: 1 is of the wrong type"),
        ("ladder = 'x'", "ladder: 'x' is of the wrong type"),
        ("include = [1]", "include: must be a list of strings"),
        ("[[override]]\nmatch = 'x'", "override 0: needs match and format"),
        ("format = 'NF5sS1E5M5'", "unknown element 'NF5'"),
        ("[[override]]\nmatch = 'x*'\nformat = 'keep'", "pattern 'x\\*': matches no tensor"),
    ],
)
def test_a_wrong_file_is_refused(source: Path, text: str, problem: str) -> None:
    config = source.with_name("settings.toml")
    config.write_text(text)
    with pytest.raises(InputError, match=problem):
        run(source, "--config", config)


def test_every_key_is_an_option_or_in_the_file_only_and_a_field_of_the_settings() -> None:
    parameters = inspect.signature(quantize).parameters
    assert {key.name for key in KEYS.values() if not key.in_file_only} <= parameters.keys()
    assert not {"ladder", "override", "options"} & parameters.keys()
    names = {field.name for field in fields(Settings)}
    assert {key.field for key in KEYS.values() if key.field} == names - {"codebooks"}
    assert Settings().to_json().keys() == names


@pytest.mark.parametrize(
    ("options", "table", "expected"),
    [
        ({}, {}, {}),
        ({}, {"format": FORMAT}, {"format": FORMAT, "bits_per_weight": None}),
        ({"bpw": "6"}, {"format": FORMAT, "opq": 1e-3}, {"bits_per_weight": "6", "outliers": 1e-3}),
        ({"format": FORMAT}, {"bpw": 4.5}, {"format": FORMAT, "bits_per_weight": None}),
        ({"feedback": False, "wr": ".5"}, {"feedback": True}, {"residuals": 0.5}),
        ({"effort": "best"}, {"bpw": 7, "effort": "fast"}, {"bits_per_weight": "7"}),
    ],
)
def test_options_win_over_the_file_and_defaults_hold_for_the_rest(
    options: dict[str, Any], table: dict[str, Any], expected: dict[str, Any]
) -> None:
    effort = {"effort": options["effort"]} if "effort" in options else {}
    assert settings_of(merged_settings(options, table), None) == Settings(**expected, **effort)


NO_NUMBERS = (
    "1/0", "9/2", "1e-99999999", "1e99999999", "nan", "inf", "-inf", "-1", "4_0", "٤", "0x4", "",
    " ", "4.5.5", "9" * 5000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--bpw", "four"], "bpw must be a number"),
        (["--bpw", "4", "-f", FORMAT], "either a format or a budget"),
        (["--effort", "most"], "effort must be one of fast, default, best"),
        (["--hif", "HIF9"], "hif must be one of"),
        (["--opq", "1"], "opq must be at least 0 and below 1"),
        *((["--bpw", text], "bpw must be a number above 0, at most 32") for text in NO_NUMBERS),
        *((["--opq", text], "opq must be at least 0 and below 1") for text in NO_NUMBERS),
        (["--wr", "-0.1"], "wr must be at least 0 and below 1"),
        (["-o", "nowhere/out.safetensors"], "nowhere: no such folder"),
        (["--dask", "tcp://127.0.0.1:1"], "no scheduler answers"),
    ],
)
def test_wrong_options_are_refused(source: Path, options: list[str], problem: str) -> None:
    output = source.with_name("out.safetensors")
    with pytest.raises(InputError, match=problem):
        run(source, *(["-o", output] if "-o" not in options else []), *options)


def test_weights_that_are_not_finite_are_named(source: Path) -> None:
    tensors = load_file(source)
    tensors[LINEAR[1]][3, 7] = np.inf
    save_file(tensors, source)
    with pytest.raises(
        InputError, match=rf"model\.safetensors: tensor '{LINEAR[1]}': .*row 3, column 7 is inf"
    ):
        _quantize(source, Settings(format=FORMAT, bits_per_weight=None))


def test_a_dry_run_writes_nothing(source: Path) -> None:
    before = sorted(source.parent.iterdir())
    output = source.with_name("out.safetensors")
    text = run(source, "-o", output, "-f", FORMAT, "--dry-run")
    assert LINEAR[0] in text
    budget = run(source, "-o", output, "--bpw", "6.5", "--effort", "fast", "--dry-run")
    assert "ppm" in budget
    assert sorted(source.parent.iterdir()) == before


# -------------------------------------------------------------------------- workers and resumption

SHORT_LADDER = ("BOF4-NF4sS1E5M5", "DD4sS1E4M3", "E2M3sUE4M4", "E3M4sUE4M4")
WITH_BUDGET = Settings(bits_per_weight="6.5", effort="fast", ladder=SHORT_LADDER)


def test_workers_make_no_difference(source: Path) -> None:
    assert _quantize(source, WITH_BUDGET) == _quantize(source, WITH_BUDGET, workers=Workers(2))


def test_a_dask_cluster_makes_no_difference(source: Path) -> None:
    distributed = pytest.importorskip("distributed")
    alone = _quantize(source, WITH_BUDGET)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        workers = Workers(dask=cluster.scheduler_address)
        assert _quantize(source, WITH_BUDGET, workers=workers) == alone


SCRIPT = """
import sys
from sop.quantizing.quantization import quantize_model
from sop.quantizing.settings import Settings
settings = Settings(bits_per_weight="6.5", effort="fast", ladder=tuple(sys.argv[3].split()))
quantize_model(sys.argv[1], sys.argv[4:], sys.argv[2], settings, resume=True)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(source: Path) -> None:
    expected = _quantize(source, WITH_BUDGET)
    output = source.with_name("out.safetensors")
    parts = output.with_name("out.safetensors.parts")
    command = [sys.executable, "-c", SCRIPT, str(source), str(output), " ".join(SHORT_LADDER)]
    command += LINEAR
    for finished in (1, 3, 5, 7):  # of four option tables and four tensors
        process = subprocess.Popen(command)
        while process.poll() is None and len(list(parts.glob("[ot]*"))) < finished:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
    subprocess.run(command, check=True)
    assert output.read_bytes() == expected
    assert not parts.exists()


def _interrupted(source: Path, output: Path) -> None:
    """Leave behind what an interrupted run does."""

    def stop(what: str, done: int, total: int) -> None:
        if what == "quantizing, weights" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, LINEAR, output, WITH_BUDGET, progress=stop)


def test_an_interrupted_run_is_not_taken_up_by_accident(source: Path) -> None:
    output = source.with_name("out.safetensors")
    _interrupted(source, output)
    with pytest.raises(InputError, match=r"out\.safetensors\.parts: left by an interrupted run"):
        quantize_model(source, LINEAR, output, WITH_BUDGET)


def test_a_run_is_resumed_with_the_same_weights_and_settings_only(source: Path) -> None:
    output = source.with_name("out.safetensors")
    _interrupted(source, output)
    other = replace(WITH_BUDGET, bits_per_weight="6.25")
    with pytest.raises(InputError, match=r"another bits_per_weight: 6\.5, not 6\.25"):
        quantize_model(source, LINEAR, output, other, resume=True)
    with pytest.raises(InputError, match="another tensors"):
        quantize_model(source, LINEAR[:2], output, WITH_BUDGET, resume=True)
    tensors = load_file(source)
    tensors[LINEAR[1]][0, 0] += 1
    save_file(tensors, source)
    os.utime(source)
    with pytest.raises(InputError, match="another source"):
        quantize_model(source, LINEAR, output, WITH_BUDGET, resume=True)


def test_every_effort_gains_on_the_one_before(source: Path) -> None:
    gaps = []
    for effort in EFFORTS:
        settings = Settings(format="DD4-DD4sS1E5M5", bits_per_weight=None, effort=effort)
        output = source.with_name(f"{effort}.safetensors")
        gaps.append(quantize_model(source, LINEAR, output, settings).fidelity.gap_ppm)
    assert gaps[0] > gaps[1] > gaps[2]


def test_the_first_override_that_matches_decides() -> None:
    settings = Settings(overrides=(Override("a*", "keep"), Override("*", FORMAT)))
    assert settings.overridden("abc") == "keep"
    assert settings.overridden("cba") == FORMAT
    assert Settings().overridden("abc") is None


SETTINGS = 'format = "NF4sUE4M4"\neffort = "fast"\n'


def test_a_byte_order_mark_does_no_harm_and_other_encodings_are_named(source: Path) -> None:
    config, output = source.with_name("settings.toml"), source.with_name("out.safetensors")
    command = [source, "-o", output, "-j", 1, "--config", config]
    config.write_text(SETTINGS, encoding="utf-8-sig")
    assert "NF4sUE4M4" in run(*command)
    for encoding, problem in {
        "utf-16": "is UTF-16 text; save it as UTF-8",
        "utf-16-le": "not UTF-8 text: NUL at byte 1",
        "utf-32": "is UTF-32 text",
    }.items():
        config.write_text(SETTINGS, encoding=encoding)
        with pytest.raises(InputError, match=rf"settings\.toml: {problem}"):
            run(*command)
    config.write_bytes(b'format = "\xe9"')
    with pytest.raises(InputError, match=r"not UTF-8: .* at byte 10"):
        run(*command)


@pytest.mark.parametrize(
    "line", ["bpw = nan", "bpw = inf", "bpw = 1e400", "opq = nan", "wr = 1e400", "bpw = '1/0'",
             f"bpw = {'9' * 5000}", f"opq = {'9' * 4000}", "bpw = 0", "a = " + "[" * 5000],
)  # fmt: skip
def test_numbers_of_a_file_that_are_none_are_refused(source: Path, line: str) -> None:
    config = source.with_name("settings.toml")
    config.write_text(line)
    with pytest.raises(InputError, match=r"must be|not TOML"):
        run(source, "-o", source.with_name("out.safetensors"), "--config", config)
