"""docs/decoder.py, the second implementation: right on the conformance set, and noticed if broken.

A set of vectors is worth as much as what it notices. Each rule of the documentation is therefore
broken here in the text of the second implementation, one at a time; the set must complain.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from golden.vectors.conformance import Level, jobs, manifest_entry, manifest_text
from tests.support.second_implementation import DECODER, SOURCE, load, some_vectors, verdicts


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
