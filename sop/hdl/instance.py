"""A Verilog wrapper that shows how a unit is instantiated, fields of payloads by name."""

from typing import Any

__all__ = ["instance_example"]


def _range(width: int) -> str:
    return f"[{width - 1}:0] " if width > 1 else ""


def instance_example(description: dict[str, Any]) -> str:
    """Verilog-2005 of a module ``example`` with one instance of a unit.

    Parameters
    ----------
    description : dict
        As :func:`sop.hdl.description.describe` gives it.
    """
    fields = {
        f"{item['name']}__payload": [
            (f"{item['name']}_{field['name']}", field["width"]) for field in item["fields"]
        ]
        for item in description["streams"]
    }
    ports, connections = [], []
    for port in description["ports"]:
        name, direction = port["name"], port["direction"]
        parts = fields.get(name, [(name.replace("__", "_"), port["width"])])
        ports += [f"    {direction:6} wire {_range(width)}{part}" for part, width in parts]
        # The first field has the lowest bits, and a concatenation ends with these.
        names = [part for part, _ in reversed(parts)]
        joined = f"{{{', '.join(names)}}}" if name in fields else names[0]
        connections.append(f"      .{name}({joined})")
    return (
        "module example (\n" + ",\n".join(ports) + "\n);\n"
        f"  {description['module']} unit (\n" + ",\n".join(connections) + "\n  );\nendmodule\n"
    )
