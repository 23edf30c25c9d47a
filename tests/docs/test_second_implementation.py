"""docs/decoder.py, the second implementation: right on the conformance set, and noticed if broken.

A set of vectors is worth as much as what it notices. Each rule of the documentation is therefore
broken here in the text of the second implementation, one at a time; the set must complain.
"""

import ast
import hashlib
import itertools
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import safetensors
from typer.testing import CliRunner, Result

import sop.cli
from golden.checkpoint import METADATA_KEY, Checkpoint, reconstruct
from golden.errors import InputError
from golden.formats import HIF7, HIF8, HIF8T, HifFormat
from golden.notation import parse_format
from golden.vectors.broken_checkpoints import BROKEN
from golden.vectors.checkpoints import checkpoint_jobs
from golden.vectors.conformance import DEFAULT_FORMATS, Level, jobs, manifest_entry, manifest_text

DECODER = Path(__file__).parents[2] / "docs" / "decoder.py"
SOURCE = DECODER.read_text()
Files = dict[str, bytes]

# Enough for every rule: a pair whose LUTs have no level at zero, a power of two with f, numbers.
FEW: tuple[tuple[str, HifFormat], ...] = (
    ("DD5-DD5sS1E4M3", HIF7),
    ("NF4T^8sUE5M0", HIF7),
    ("BOF4-NF4^8sS1E3M3", HIF8),
    ("NF4-DD4sRS1E2M4", HIF8T),
    ("E4M3^8sBF16", HIF7),
    ("INT8sS1E4M3", HIF7),
    ("DD5^8sUE5M7", HIF7),  # products of more than 8 bits, which bfloat16 rounds
)


def load(text: str) -> Any:
    """The second implementation, from its source text."""
    module = ModuleType("second_implementation")
    exec(compile(text, str(DECODER), "exec"), module.__dict__)
    return module


@cache
def some_vectors(*kinds: str) -> Files:
    """A small set that holds these kinds of files only."""
    formats = [parse_format(name, hif) for name, hif in FEW]
    found = [job for job in jobs(Level.QUICK, formats) if job.folder in kinds]
    if "checkpoints" in kinds:
        every = [parse_format(name, hif) for name, hif in DEFAULT_FORMATS]
        own = [parse_format("siss-miss^8sUE4M4"), parse_format("NF4T-SH4T^32sS1E4M3", HIF8)]
        found = [job for job in found if job.folder != "checkpoints"]
        found += checkpoint_jobs([*every, *own], whole=True)
    files, entries = {}, []
    for job in found:
        file = job.build()
        files[job.path] = file.data
        entries.append(manifest_entry(job, file))
    return files | {"manifest.json": manifest_text(Level.QUICK, formats, entries).encode()}


def complaints(text: str, *kinds: str) -> dict[str, str]:
    found: dict[str, str] = load(text).VectorSet(some_vectors(*kinds)).check()
    return found


def test_it_needs_nothing_but_the_standard_library() -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported <= sys.stdlib_module_names


def test_it_agrees_with_a_set_of_few_formats() -> None:
    kinds = (
        "numbers", "encode", "codebooks", "products", "tensors", "decode", "blocks", "kernel",
    )  # fmt: skip
    assert complaints(SOURCE, *kinds) == {}
    assert complaints(SOURCE, "checkpoints") == {}


def test_it_agrees_with_the_exhaustive_set(thorough: bool) -> None:
    if not thorough:
        pytest.skip("only with --all-simulations")
    files, entries = {}, []
    for job in jobs(Level.EXHAUSTIVE):
        file = job.build()
        files[job.path] = file.data
        entries.append(manifest_entry(job, file))
    manifest = manifest_text(Level.EXHAUSTIVE, [], entries).encode()
    assert load(SOURCE).VectorSet(files | {"manifest.json": manifest}).check() == {}


# Kind of the vectors that notice, and what is changed in the source: pairs of old and new text.
BREAKS: dict[str, tuple[str, ...]] = {
    # padding
    "padding is not judged": (
        "checkpoints",
        'demand(flags == 0, "range"',
        'demand(flags == 0 or i % self.stored_columns >= columns, "range"',
    ),
    "padding refuses no encoding": (
        "blocks",
        "for value in dense if value)",
        "for value, norm in zip(dense, norms) if value and norm)",
    ),
    # order of arithmetic
    "sum of neighbours": (
        "blocks", "values[i] + values[half + i]", "values[2 * i] + values[2 * i + 1]"
    ),
    "sum from left to right": (
        "blocks",
        "values[i] + values[half + i] for i in range(half)",
        "values[0] + values[1], *values[2:]",
    ),
    "product with norms first": (
        "blocks", "(residual * residual) * (norm * norm)", "(residual * norm) * (residual * norm)"
    ),
    "product from left to right": (
        "blocks", "(residual * residual) * (norm * norm)", "residual * residual * norm * norm"
    ),
    "norms not squared": (
        "blocks", "(residual * residual) * (norm * norm)", "residual * residual * norm"
    ),
    # scales and layer exponent
    "f one too large": ("blocks", "self.f += 1", "self.f += 1\n            self.f += 1"),
    "a scale beyond the largest saturates": (
        "blocks",
        "while largest > math.ldexp(limit, self.f)",
        "while largest > math.ldexp(limit, self.f) * (1 + 2.0**-20)",
        "position = bisect_left(scales.values, wanted)",
        "position = min(bisect_left(scales.values, wanted), len(scales.values) - 1)",
    ),
    "f by the larger of both small ends": (
        "blocks", "limit = min(grid.small_end", "limit = max(grid.small_end"
    ),
    "power of two to nearest": ("blocks", 'self.scale.facts["mantissa_bits"] == 0', "False"),
    "any scale upwards": ("blocks", 'absmax and self.scale.facts["mantissa_bits"] == 0', "absmax"),
    "absmax maps to the larger end": (
        "blocks", "grid.small_end if absmax", "abs(grid.large_end) if absmax"
    ),
    "scale 0 for small blocks": ("blocks", "if scales.values[position] == 0:", "if False:"),
    "last extreme": (
        "blocks",
        "magnitudes.index(max(magnitudes))",
        "len(block) - 1 - magnitudes[::-1].index(max(magnitudes))",
    ),
    "equal errors take the second LUT": (
        "blocks", "(error, metabit, word,", "(error, -metabit, word,"
    ),
    "ties of levels go up": ("blocks", "[False] * (len(order) - 1)", "[True] * (len(order) - 1)"),
    "blocks of zeros like others": ("blocks", "if not any(block):", "if False:"),
    # number formats
    "bias one more": ("numbers", '"bias": 2 ** (e - 1) - 1', '"bias": 2 ** (e - 1)'),
    "no subnormals": ("numbers", "(field > 0) * (1 << m)", "(1 << m)"),
    "NaN of E4M3 is a number": ("numbers", '"E4M3": "nan_all_ones", ', ""),
    "ties to odd": ("encode", "code % 2 == 1 for code", "code % 2 == 0 for code"),
    "half away from zero": ("products", "(rest == half and magnitude & 1)", "rest == half"),
    "range before rounding": (
        "products",
        "magnitude, exponent = magnitude >> 1, exponent + 1",
        "magnitude, exponent, half = magnitude >> 1, exponent + 1, None",
        "if biased < 1:",
        "if biased < 1 + (surplus > 0 and half is None):",
    ),
    "reserved shifts as they are": ("tensors", 'min(shift, facts["shifts"] - 1)', "shift"),
    "twins before mirroring": ("codebooks", "level + half_step, 1.0)", "level - half_step, 1.0)"),
    "levels on another grid": ("codebooks", "x * full)", "x * (full - 1))"),
    # the kernel
    "blocks from the last to the first": (
        "kernel",
        'for start in range(0, self.columns, case["kernel_block_size"]):',
        'for start in reversed(range(0, self.columns, case["kernel_block_size"])):',
    ),
    "products of blocks with 30 bits": (
        "kernel", "total = plus(total, rounded(term))", "total = plus(total, rounded(term, 30))"
    ),
    "row scale of the kernel left out": (
        "kernel", "y = times(y, math.copysign(factor, sign))", "y = times(y, 1)"
    ),
    "row scale behind the corrections": (
        "kernel",
        'if case["row_scales"] is not None:\n            sign',
        'if False:\n            sign',
        "            y = plus(y, times(math.copysign(factor, sign), x))\n",
        "            y = plus(y, times(math.copysign(factor, sign), x))\n"
        '        if case["row_scales"] is not None:\n'
        '            sign, factor = self._signed(bfloat16, case["row_scales"][row])\n'
        "            y = times(y, math.copysign(factor, sign))\n",
    ),
    "corrections from the last to the first": (
        "kernel", "for entry in range(first, last):", "for entry in reversed(range(first, last)):"
    ),
    "no subnormal outputs": (
        "kernel", "-125 - precision)", "-125 - precision)\n    quantum *= 2**3"
    ),
    "the last infinity stays": (
        "kernel",
        "return first if math.isinf(first) else second",
        "return second if math.isinf(second) else first",
    ),
    "exact sums rounded block by block": (
        "kernel", "whole += term", "whole += Fraction(min(max(rounded(term), -1e38), 1e38))"
    ),
    "activation scales to nearest": (
        "kernel", "position = min(bisect_left(scales.values, wanted), len(scales.values) - 1)",
        "position = scales.nearest(wanted)",
    ),
    "activation scales by the larger end": (
        "kernel",
        "end, shift, largest = element.grid.small_end",
        "end, shift, largest = 2 * element.grid.small_end",
    ),
    "no powers of two for tokens": ("kernel", "shift += 1", "break"),
    # names
    "no s in own names": ("checkpoints", "[a-z][a-z0-9]{0,23}", "[a-rt-z][a-rt-z0-9]{0,23}"),
    "no twins": ("checkpoints", "(?:NF4|BOF4|Split87|SH4)T?", "(?:NF4|BOF4|Split87|SH4)"),
    # files
    "hash of the parsed configuration": (
        "checkpoints",
        'hashlib.sha256(facts["config"].encode())',
        'hashlib.sha256(json.dumps(json.loads(facts["config"])).encode())',
    ),
    "first element in the high bits": (
        "tensors", "range(count * width, 0, -width)", "range(width, count * width + 1, width)"
    ),
    "32-bit columns one column later": (
        "checkpoints", '"U32" if columns > 65536', '"U32" if columns > 65537'
    ),
    "32-bit columns one column earlier": (
        "checkpoints", '"U32" if columns > 65536', '"U32" if columns >= 65536'
    ),
    "row scale of another row": (
        "checkpoints",
        "row_scales[i // self.stored_columns]",
        "row_scales[i // self.stored_columns - 1]",
    ),
    "metabit upside down": (
        "checkpoints",
        "luts[word >> fmt.scale.bits][index]",
        "luts[~(word >> fmt.scale.bits)][index]",
    ),
    "one block for each row under ^0": (
        "checkpoints", "rows * columns, columns, 1", "columns, columns, rows"
    ),
    "corrections of another row": (
        "checkpoints", "row * columns + last", "max(row - 1, 0) * columns + last"
    ),
    "corrections replace": (
        "checkpoints", "float32_value(weights[position]) + float32", "float32"
    ),
    "corrections truncate": (
        "checkpoints",
        'struct.pack("<f", total)',
        'struct.pack("<f", math.nextafter(total, 0.0))',
    ),
    "subnormal sums are lost": (
        "checkpoints",
        'struct.pack("<f", total)',
        'struct.pack("<f", total * (abs(total) >= SMALLEST_NORMAL))',
    ),
}  # fmt: skip


def without(name: str) -> str:
    """Source of the second implementation without a rule."""
    text, changes = SOURCE, BREAKS[name][1:]
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text, f"the text that is to be changed has changed: {old}"
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_rule_is_noticed(name: str) -> None:
    assert complaints(without(name), BREAKS[name][0]), f"no vector notices: {name}"


# -------------------------------------------------------------------------- broken checkpoints

# Checks that no small file can reach: of millions of values; and of lengths beyond the end of the
# file, in front of which there is no whole header anyway.
UNREACHED = ("<= 4000000", "len(content) - 8", "len(content) >= 8")


def checks() -> dict[str, tuple[int, int]]:
    """Where the second implementation's checks of a checkpoint stand in its source."""
    lines = SOURCE.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found = {}
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "demand":
            start = starts[node.lineno - 1] + node.col_offset
            found[f"{node.lineno}: {ast.unparse(node)}"] = (start, start + len("demand("))
    return found


@cache
def verdicts() -> dict[str, tuple[bytes, tuple[str | None, ...] | None]]:
    """Content and verdict of every checkpoint, None for the good ones."""
    files = some_vectors("checkpoints")
    found: dict[str, tuple[bytes, tuple[str | None, ...] | None]] = {}
    for case in json.loads(files["checkpoints/verdicts.json"])["cases"]:
        verdict = tuple(case["verdict"][key] for key in ("kind", "tensor", "field"))
        found[case["file"]] = (files[f"checkpoints/{case['file']}"], verdict)
    return found


@pytest.mark.parametrize(
    "check", [check for check in checks() if not any(part in check for part in UNREACHED)]
)
def test_a_missing_check_is_noticed(check: str) -> None:
    start, stop = checks()[check]
    module = load(SOURCE[:start] + "demand(True or " + SOURCE[stop:])
    for content, expected in verdicts().values():
        try:
            if module.verdict(content) != expected:
                return
        except Exception:  # falls over what it did not refuse
            return
    pytest.fail(f"no broken checkpoint notices: {check}")


def run_sop(*arguments: str | Path) -> Result:
    """Run the command line in this process; what ``main`` makes of errors is tested once below."""
    return CliRunner().invoke(sop.cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", BROKEN)
def test_sop_gives_the_stated_verdict(name: str, tmp_path: Path) -> None:
    path, output = tmp_path / "model.safetensors", tmp_path / "decoded.safetensors"
    content, verdict = verdicts()[f"broken_{name}.safetensors"]
    assert verdict is not None
    kind, tensor, field = verdict
    path.write_bytes(content)
    commands: list[list[str | Path]] = [["decode", path, "-o", output]]
    if kind != "range":  # a reader may find that when it decodes
        commands.append(["inspect", path])
    where = f"{path}: " + ("" if tensor is None else f"tensor {tensor!r}: ")
    for command in commands:
        error = run_sop(*command).exception
        assert isinstance(error, InputError)
        assert str(error).startswith(where)
        assert (field or "") in str(error).removeprefix(where)
        assert not output.exists()


def test_a_refusal_is_the_last_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(verdicts()["broken_padding_overflow.safetensors"][0])
    command = [
        sys.executable,
        "-m",
        "sop.cli",
        "decode",
        str(path),
        "-o",
        str(tmp_path / "o.safetensors"),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]  # after what it says of its progress
    assert re.fullmatch(rf"sop: {re.escape(str(path))}: tensor 'b': .* overflow float32", line)


def matrix_of(decoded: Any, name: str, shape: list[int]) -> bytes:
    """Values of a quantized matrix out of the tensors of the model, stacked and transposed ones."""
    if name in decoded.keys():
        matrix = decoded.get_tensor(name)
    else:
        whole, _, index = name.removesuffix("]").rpartition("[")
        matrix = decoded.get_tensor(whole)[int(index)]
    if list(matrix.shape) != shape:
        matrix = matrix.T
    assert list(matrix.shape) == shape
    return bytes(matrix.tobytes())  # row by row, whatever the order in memory


def test_good_checkpoints_are_decoded_alike(tmp_path: Path) -> None:
    """By ``sop decode`` and by the command line of the second implementation."""
    files = some_vectors("checkpoints")
    for case in json.loads(files["checkpoints/expected.json"])["cases"]:
        path, output = tmp_path / case["file"], tmp_path / "decoded.safetensors"
        path.write_bytes(files[f"checkpoints/{case['file']}"])
        assert run_sop("decode", path, "-o", output).exit_code == 0
        command = [sys.executable, str(DECODER), "decode", str(path)]
        done = subprocess.run(
            command, check=True, capture_output=True, timeout=60, encoding="utf-8"
        )
        lines = set(done.stdout.splitlines())
        opener: Any = safetensors.safe_open  # its stubs are not annotated
        decoded = opener(str(output), framework="numpy")
        for name, expected in case["quantized"].items():
            digest = hashlib.sha256(matrix_of(decoded, name, expected["shape"])).hexdigest()
            assert digest == expected["sha256"]
            assert f"{digest} {'x'.join(map(str, expected['shape']))} {name}" in lines
        assert len(lines) == len(case["quantized"]) + len(case["raw"])


def test_the_command_line_of_the_second_implementation(tmp_path: Path) -> None:
    content, _ = verdicts()["broken_lut_reserved.safetensors"]
    (tmp_path / "broken").write_bytes(content)
    files = dict(some_vectors("codebooks"))
    cases = json.loads(files["manifest.json"])["cases"]
    for folder, changed in (("good", b""), ("bad", b" ")):
        for path, data in files.items():
            target = tmp_path / folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data + changed * (path != "manifest.json"))
    expected = {
        ("decode", "broken"): (2, f"{tmp_path / 'broken'}: tensor 'a': luts[1]: a NaN or reserved"),
        ("check", "good"): (0, f"{cases} answers, all the same here"),
        ("check", "bad"): (1, "codebooks/codebooks.json"),
        ("check", ""): (2, "usage"),
    }
    for (command, name), (code, message) in expected.items():
        arguments = [
            sys.executable,
            str(DECODER),
            command,
            *([str(tmp_path / name)] if name else []),
        ]
        done = subprocess.run(arguments, capture_output=True, timeout=60, encoding="utf-8")
        assert (done.returncode, message in done.stdout + done.stderr) == (code, True)


def test_there_are_at_least_thirty_of_every_kind() -> None:
    kinds = {broken.kind for broken in BROKEN.values()}
    assert kinds == {"container", "metadata", "layout", "plane", "code", "corrections", "range"}
    assert len(BROKEN) >= 30
    bases = {name: content for name, (content, _) in verdicts().items()}
    assert len(set(bases.values())) == len(BROKEN)


# ------------------------------------------------------------------------------------ format names

ELEMENTS = (
    "E2M3", "INT8", "HIF8T", "NF4", "NF4T", "Split87T", "DD4", "DD5", "DD6", "s", "siss", "NF4-DD4",
    "NF4-NF4T", "DD5-DD5", "DD5-DD6", "DD4-s", "ss-sss", "NF4-NF4", "s-s", "E2M3-NF4",
    "DD4-DD4-DD4", "HIF9", "NF5", "Siss", "a" * 24, "a" * 25, "ä", "INT4T", "DD4T", "1s", "",
)  # fmt: skip
BLOCKS = ("", "^0", "^8", "^16", "^32", "^64", "^08", "^128", "^", "8")
SCALES = (
    "UE4M4", "S1E5M5", "S1E7M7", "BF16", "UE8M0", "UE2M0", "RUE4M4", "RS1E2M4", "RBF16", "E4M4",
    "UE8M1", "UE1M4", "UE4M8", "S1E8M0", "SE4M4", "UE4M", "uE4M4", "R", "UE4M4 ", "UE4M4s",
    "RRUE4M4",
)  # fmt: skip


def test_both_read_format_names_alike() -> None:
    """By the grammar of docs/formats.md, and by the parser that knows ``^16`` too."""
    module = load(SOURCE)
    accepted = 0
    for name in map("".join, itertools.product(ELEMENTS, BLOCKS, ("s", "", "S", "ss"), SCALES)):
        try:
            expected = parse_format(name)
        except InputError:
            expected = None
        if expected is None or expected.name != name:
            with pytest.raises(module.Refused):
                module.Format(name)
            continue
        found = module.Format(name)
        assert (found.books, found.block, found.row_scale) == (
            expected.codebooks, expected.block_size, expected.row_scale
        ), name  # fmt: skip
        assert (found.index_bits, found.word_bits, found.scale.bits) == (
            expected.index_bits, expected.word.width, expected.word.scale.width
        ), name  # fmt: skip
        assert found.atom == (None if expected.atom is None else expected.atom.name)
        accepted += 1
    assert accepted > 500


# ------------------------------------------------------------------------- both on random damage

VALUES: list[Any] = [
    None, True, 0, -1, 1, 2, 128, 1 << 31, 1.0, "", "a", "U8", "BF16", "HIF8", "{}", {}, [], [0, 1],
    "NF4sUE4M4", "E2M1^8sBF16", {"tensor": "a", "index": 0, "count": 1, "transposed": False},
]  # fmt: skip
NAMES = ("n", "a", "b.row_scales", "a.indices", "x", "", "a[0]", "é")


def damaged_json(value: Any, random: Random) -> None:
    """Change, remove or rename one thing somewhere in a JSON object."""
    while True:
        key = random.choice(list(value))
        inner = value[key]
        if not (isinstance(inner, dict) and inner and random.random() < 0.7):
            break
        value = inner
    if isinstance(inner, list) and inner and random.random() < 0.5:
        inner[random.randrange(len(inner))] = random.choice(VALUES)
    elif random.random() < 0.3:
        value.pop(key)
    elif random.random() < 0.3:
        value[random.choice(NAMES)] = inner if random.random() < 0.5 else value.pop(key)
    else:
        value[key] = random.choice(VALUES)


def damaged(content: bytes, random: Random) -> bytes:
    """A checkpoint with something changed in its header, in the metadata, or in its bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    where = random.randrange(3)
    if where == 0:
        damaged_json(header, random)
    elif where == 1:
        metadata = json.loads(header["__metadata__"][METADATA_KEY])
        damaged_json(metadata, random)
        header["__metadata__"][METADATA_KEY] = json.dumps(metadata)
    else:
        for _ in range(random.randint(1, 3)):
            data[random.randrange(len(data))] = random.choice([0, 1, 127, 128, 255])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def accepted(path: Path) -> bool:
    """Whether the golden model reads and decodes everything in a file."""
    try:
        with Checkpoint(path) as checkpoint:
            for name in checkpoint.names:
                reconstruct(checkpoint.read(name))
    except InputError:
        return False
    return True


@pytest.mark.parametrize("seed", [1, 2])
def test_both_refuse_and_accept_the_same_damaged_files(tmp_path: Path, seed: int) -> None:
    random, path, module = Random(seed), tmp_path / "model.safetensors", load(SOURCE)
    whole = some_vectors("checkpoints")["checkpoints/whole.safetensors"]
    results = []
    for number in range(300):
        content = damaged(whole, random)
        path.write_bytes(content)
        results.append(accepted(path))
        assert (module.verdict(content) is None) == results[-1], f"seed {seed}, file {number}"
    assert 10 < sum(results) < 290
