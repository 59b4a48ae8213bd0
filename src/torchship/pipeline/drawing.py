"""Draws a plan: as text for terminals, and as a self-contained SVG that follows the reader's light or dark theme."""

from __future__ import annotations

from dataclasses import dataclass

from torchship.pipeline.planning import Node, Plan
from torchship.pipeline.wiring import REQUEST
from torchship.plugins import rendered
from torchship.tensors import TensorSpec

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN, _LANE = 320, 62, 48, 84, 24, 16
_ANSWER = "answer"
_END = "(answer)"  # its key among the boxes: a stage may be called answer, but never this


def _specs(plan: Plan) -> dict[str, TensorSpec]:
    """The spec of every slot."""
    found = dict(zip(plan.inputs, plan.signature.inputs, strict=True))
    for node in plan.nodes:
        found |= dict(zip(node.gives, node.signature.outputs, strict=True))
    return found


def _kind(node: Node) -> str:
    """One line on how a node runs."""
    words = [f"rows, up to {node.max_batch} at once" if node.signature.batched else "one job at a time"]
    words += [f"{node.config.copies} copies"] if node.config.copies != 1 else []
    words += [node.config.devices[0]] if node.config.device != "cpu" else []
    return ", ".join(words)


def _source(node: Node) -> str:
    """What a node runs."""
    config = node.config
    remote = config.remote if isinstance(config.remote, str) else ", ".join(config.remote)
    return config.run or remote or config.artifact


def as_text(plan: Plan) -> str:
    """The plan, top to bottom; beside each input the tensor that it takes."""
    lines = [f"{plan.name}: {'a row stage' if plan.signature.batched else 'a job stage'}", ""]
    lines += [f"  {REQUEST:<12} gives {spec}" for spec in plan.signature.inputs]
    for node in plan.nodes:
        lines += ["", f"  {node.index + 1} {node.name}  ({_source(node)}; {_kind(node)})"]
        check = "" if node.checked else "  (checked at run time)"
        taken = zip(node.signature.inputs, node.takes, strict=True)
        lines += [f"      takes {spec}  <- {key}{check}" for spec, key in taken]
        lines += [f"      gives {spec}" for spec in node.signature.outputs]
        for parameter in node.parameters:
            value = node.defaults.get(parameter.name, parameter.default)
            low, high = parameter.low, parameter.high
            bounds = "" if low is None or high is None else f" ({low:g} to {high:g})"
            lines.append(f"      parameter {parameter.name} = {value}{bounds}")
        beside = [other.name for other in plan.nodes[: node.index] if other.index not in plan.before(node)]
        lines += [f"      runs beside {', '.join(beside)}"] if beside else []
    answers = zip(plan.signature.outputs, plan.outputs, strict=True)
    lines += ["", *(f"  {_ANSWER:<12} takes {spec}  <- {key}" for spec, key in answers)]
    used = {*plan.outputs, *(key for node in plan.nodes for key in node.takes)}
    unused = [key for key in _specs(plan) if key not in used]
    lines += ["", f"  nobody takes {', '.join(unused)}"] if unused else []
    return "\n".join(lines)


@dataclass(frozen=True)
class _Box:
    """One rectangle: its place, its two lines, its CSS class."""

    x: int
    y: int
    title: str
    about: str
    look: str


def as_svg(plan: Plan) -> str:
    """The plan as a drawing, top to bottom: stages beside one another may run at the same time."""
    boxes = _boxes(plan)
    paths, labels = _arrows(plan, boxes)
    lanes = sum(len(node.takes) for node in plan.nodes) + len(plan.outputs)
    width = max(box.x for box in boxes.values()) + _WIDTH + _MARGIN + min(lanes, 8) * _LANE
    height = max(box.y for box in boxes.values()) + _HEIGHT + _MARGIN
    sizes = {"width": width, "height": height, "box_width": _WIDTH, "box_height": _HEIGHT}
    marks = {"boxes": boxes.values(), "paths": paths, "labels": labels}
    return str(rendered("torchship.pipeline", "plan.svg.j2", name=plan.name, **marks, **sizes))


def _boxes(plan: Plan) -> dict[str, _Box]:
    """The request, the stages by depth, and the answer."""
    depths: list[int] = []
    for node in plan.nodes:
        depths.append(1 + max((depths[index] for index in node.after), default=0))
    placed = list(zip(plan.nodes, depths, strict=True))
    floors = [[node for node, at in placed if at == depth] for depth in range(1, max(depths) + 1)]
    step, widest = _WIDTH + _GAP_X, max(map(len, floors))

    def box(title: str, about: str, look: str, *, depth: int, place: int = 0, many: int = 1) -> _Box:
        """A box at `place` of the `many` in its row, which is centred."""
        x = _MARGIN + (widest - many) * step // 2 + place * step
        return _Box(x, _MARGIN + depth * (_HEIGHT + _GAP_Y), title, about, look)

    boxes = {REQUEST: box(REQUEST, _short(plan.name), "end", depth=0)}
    for depth, floor in enumerate(floors, 1):
        for place, node in enumerate(floor):
            about, look = f"{_short(_source(node))} · {_kind(node)}", "row" if node.signature.batched else "job"
            boxes[node.name] = box(node.name, about, look, depth=depth, place=place, many=len(floor))
    about = _short(", ".join(spec.name for spec in plan.signature.outputs))
    boxes[_END] = box(_ANSWER, about, "end", depth=len(floors) + 1)
    return boxes


def _short(text: str, most: int = 24) -> str:
    *folders, text = text.rpartition(":")[2].rstrip("/").split("/")
    if text.isdigit() and folders:  # a version in a store
        text = f"{folders[-1]}@{text}"
    return text if len(text) <= most else text[: most - 1] + "…"


def _arrows(plan: Plan, boxes: dict[str, _Box]) -> tuple[list[str], list[tuple[int, int, str]]]:
    """The way of each box's tensors to another as an SVG path, and their names with their places above its end."""
    makers = dict.fromkeys(plan.inputs, REQUEST) | {key: node.name for node in plan.nodes for key in node.gives}
    specs = _specs(plan)
    ways: dict[tuple[str, str], list[str]] = {}
    for node in plan.nodes:
        for key in node.takes:
            ways.setdefault((makers[key], node.name), []).append(str(specs[key]))
    for key in plan.outputs:
        ways.setdefault((makers[key], _END), []).append(specs[key].name)
    lane = max(box.x for box in boxes.values()) + _WIDTH
    above = dict.fromkeys(boxes, 0)
    paths, labels = [], []
    for (maker, taker), texts in ways.items():
        start, end = boxes[maker], boxes[taker]
        x1, y1, x2, y2 = start.x + _WIDTH // 2, start.y + _HEIGHT, end.x + _WIDTH // 2, end.y
        middle, half = (y1 + y2) // 2, _GAP_Y // 2
        way = f"C{x1} {middle} {x2} {middle} {x2} {y2}"
        if y2 - y1 > _GAP_Y + 1:  # around what stands between them
            lane += _LANE
            way = f"C{x1} {y1 + half} {lane} {y1 + half} {lane} {y1 + _GAP_Y} L{lane} {y2 - _GAP_Y} "
            way += f"C{lane} {y2 - half} {x2} {y2 - half} {x2} {y2}"
        paths.append(f"M{x1} {y1} {way}")
        for text in [", ".join(texts)] if taker == _END else texts:
            labels.append((x2 + 10, y2 - 8 - 13 * above[taker], text))
            above[taker] += 1
    return paths, labels
