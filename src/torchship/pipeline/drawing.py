"""Draws a plan: as text for terminals, and as a self-contained SVG that follows the reader's light or dark theme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from torchship.pipeline.planning import Node, Plan
from torchship.pipeline.wiring import REQUEST
from torchship.tensors import TensorSpec

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN, _LANE = 320, 62, 48, 84, 24, 16
_ANSWER = "answer"
_END = "(answer)"  # its key among the boxes: a stage may be called answer, but never this
_STYLE = """
  text { font: 13px ui-sans-serif, system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 11px; fill: #59636e }  .name { font-weight: 600 }
  .label { paint-order: stroke; stroke: #fff; stroke-width: 4px }
  rect { fill: #f6f8fa; stroke: #8c959f; rx: 8 }  .row rect { fill: #ddf4ff; stroke: #54aeff }
  .end rect { fill: none; stroke-dasharray: 4 3 }
  path { fill: none; stroke: #8c959f; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }  .small { fill: #9198a1 }  .label { stroke: #0d1117 }
    rect { fill: #161b22; stroke: #656c76 }  .row rect { fill: #0c2d4a; stroke: #388bfd }  path { stroke: #656c76 }
  }
"""


def specs(plan: Plan) -> dict[str, TensorSpec]:
    """The spec of every slot of a plan."""
    found = dict(zip(plan.inputs, plan.signature.inputs, strict=True))
    for node in plan.nodes:
        found |= dict(zip(node.gives, node.signature.outputs, strict=True))
    return found


def kind(node: Node) -> str:
    """One line on how a node runs."""
    words = [f"rows, up to {node.max_batch} at once" if node.signature.batched else "one job at a time"]
    words += [f"{node.config.copies} copies"] if node.config.copies != 1 else []
    words += [node.config.first_device] if node.config.device != "cpu" else []
    return ", ".join(words)


def source(node: Node) -> str:
    """What a node runs."""
    config = node.config
    remote = config.remote if isinstance(config.remote, str) else ", ".join(config.remote)
    return config.run or remote or config.artifact


def as_text(plan: Plan) -> str:
    """The plan, top to bottom; beside each input the tensor that it takes."""
    at_hand = specs(plan)
    lines = [f"{plan.name}: {'a row stage' if plan.signature.batched else 'a job stage'}", ""]
    lines += [f"  {REQUEST:<12} gives {spec}" for spec in plan.signature.inputs]
    for node in plan.nodes:
        lines += ["", f"  {node.index + 1} {node.name}  ({source(node)}; {kind(node)})"]
        for spec, key in zip(node.signature.inputs, node.takes, strict=True):
            check = "" if node.checked else "  (checked at run time)"
            lines.append(f"      takes {spec}  <- {key}{check}")
        lines += [f"      gives {spec}" for spec in node.signature.outputs]
        for parameter in node.parameters:
            value = node.defaults.get(parameter.name, parameter.default)
            bounds = (
                f" ({parameter.low:g} to {parameter.high:g})" if None not in (parameter.low, parameter.high) else ""
            )
            lines.append(f"      parameter {parameter.name} = {value}{bounds}")
        beside = [other.name for other in plan.nodes if _beside(node, other, plan) and other.index < node.index]
        lines += [f"      runs beside {', '.join(beside)}"] if beside else []
    lines += ["", *(f"  {_ANSWER:<12} takes {spec}  <- {key}" for spec, key in _answers(plan))]
    carried = {key for node in plan.nodes[:-1] for key in node.keeps} - set(plan.nodes[-1].gives)
    unused = [key for key in at_hand if key not in carried and key not in plan.outputs and not _is_taken(key, plan)]
    lines += ["", f"  nobody takes {', '.join(unused)}"] if unused else []
    return "\n".join(lines)


def _answers(plan: Plan) -> Iterator[tuple[TensorSpec, str]]:
    return zip(plan.signature.outputs, plan.outputs, strict=True)


def _is_taken(key: str, plan: Plan) -> bool:
    return any(key in node.takes for node in plan.nodes)


def _beside(one: Node, other: Node, plan: Plan) -> bool:
    """Whether neither waits for the other."""
    return one is not other and one.index not in before(other, plan) and other.index not in before(one, plan)


def before(node: Node, plan: Plan) -> set[int]:
    """The indices of all nodes that must have run before `node`."""
    found: set[int] = set()
    for index in node.after:
        found |= {index} | before(plan.nodes[index], plan)
    return found


@dataclass(frozen=True)
class _Box:
    """One rectangle: its place, its two lines, its CSS class."""

    x: float
    y: float
    title: str
    about: str
    look: str


def as_svg(plan: Plan) -> str:
    """The plan as a drawing, top to bottom: stages beside one another may run at the same time."""
    boxes = _boxes(plan)
    lanes = sum(len(node.takes) for node in plan.nodes) + len(plan.outputs)
    width = max(box.x for box in boxes.values()) + _WIDTH + _MARGIN + min(lanes, 8) * _LANE
    height = max(box.y for box in boxes.values()) + _HEIGHT + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="pipeline {escape(plan.name)}">',
        f"<style>{_STYLE}</style>",
        *sorted(_arrows(plan, boxes), key=lambda part: part.startswith("<text")),  # no line crosses a label
        *(_drawn(box) for box in boxes.values()),
        "</svg>",
    ]
    return "\n".join(parts)


def _boxes(plan: Plan) -> dict[str, _Box]:
    depths: dict[int, int] = {}
    for node in plan.nodes:
        depths[node.index] = 1 + max((depths[index] for index in node.after), default=0)
    floors: dict[int, list[Node]] = {}
    for node in plan.nodes:
        floors.setdefault(depths[node.index], []).append(node)
    widest = max(len(floor) for floor in floors.values())
    span = widest * (_WIDTH + _GAP_X) - _GAP_X
    boxes = {REQUEST: _end(REQUEST, plan.name, span, 0)}
    for depth, floor in floors.items():
        left = _MARGIN + (span - len(floor) * (_WIDTH + _GAP_X) + _GAP_X) / 2
        for place, node in enumerate(floor):
            x, y = left + place * (_WIDTH + _GAP_X), _MARGIN + depth * (_HEIGHT + _GAP_Y)
            look = "row" if node.signature.batched else "job"
            boxes[node.name] = _Box(x, y, node.name, f"{_short(source(node))} · {kind(node)}", look)
    about = ", ".join(spec.name for spec in plan.signature.outputs)
    boxes[_END] = _end(_ANSWER, about, span, max(floors) + 1)
    return boxes


def _end(title: str, about: str, span: float, depth: int) -> _Box:
    return _Box(_MARGIN + (span - _WIDTH) / 2, _MARGIN + depth * (_HEIGHT + _GAP_Y), title, _short(about), "end")


def _short(text: str, most: int = 24) -> str:
    *folders, text = text.rpartition(":")[2].rstrip("/").split("/")
    if text.isdigit() and folders:  # a version in a store
        text = f"{folders[-1]}@{text}"
    return text if len(text) <= most else text[: most - 1] + "…"


def _drawn(box: _Box) -> str:
    return (
        f'<g class="{box.look}"><rect x="{box.x:g}" y="{box.y:g}" width="{_WIDTH}" height="{_HEIGHT}"/>'
        f'<text class="name" x="{box.x + 14:g}" y="{box.y + 26:g}">{escape(box.title)}</text>'
        f'<text class="small" x="{box.x + 14:g}" y="{box.y + 46:g}">{escape(box.about)}</text></g>'
    )


def _arrows(plan: Plan, boxes: dict[str, _Box]) -> Iterator[str]:
    makers = dict.fromkeys(plan.inputs, REQUEST) | {key: node.name for node in plan.nodes for key in node.gives}
    ways: dict[tuple[str, str], list[str]] = {}
    at_hand = specs(plan)
    for node in plan.nodes:
        for key in node.takes:
            ways.setdefault((makers[key], node.name), []).append(str(at_hand[key]))
    for _, key in _answers(plan):
        ways.setdefault((makers[key], _END), []).append(at_hand[key].name)
    lane = max(box.x for box in boxes.values()) + _WIDTH
    above: dict[str, int] = {}
    for (maker, taker), texts in ways.items():
        start, end = boxes[maker], boxes[taker]
        x1, y1, x2, y2 = start.x + _WIDTH / 2, start.y + _HEIGHT, end.x + _WIDTH / 2, end.y
        if y2 - y1 > _GAP_Y + 1:  # around what stands between them
            lane += _LANE
            first = f"C{x1:g} {y1 + _GAP_Y / 2:g} {lane:g} {y1 + _GAP_Y / 2:g} {lane:g} {y1 + _GAP_Y:g}"
            last = f"C{lane:g} {y2 - _GAP_Y / 2:g} {x2:g} {y2 - _GAP_Y / 2:g} {x2:g} {y2:g}"
            yield f'<path d="M{x1:g} {y1:g} {first} L{lane:g} {y2 - _GAP_Y:g} {last}"/>'
        else:
            middle = (y1 + y2) / 2
            yield f'<path d="M{x1:g} {y1:g} C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}"/>'
        for text in [", ".join(texts)] if taker == _END else texts:
            y = y2 - 8 - 13 * above.get(taker, 0)
            above[taker] = above.get(taker, 0) + 1
            yield f'<text class="small label" x="{x2 + 10:g}" y="{y:g}">{escape(text)}</text>'
