"""The constructs that stop an export, a row for each: how it shows, why it stops, what to do, and who rewrites it."""

from __future__ import annotations

import re

import msgspec

from torchship.doctor import edits


class Construct(msgspec.Struct, frozen=True):
    """One row. `pattern` is searched in an error's text, `code` (where given) in the user's line; `words` say why it
    stops an export, `edit` what to do, and `rewrite` does it where that is safe.

    `seen` is what to say where the source shows it and nothing has failed: a warning where it is `serious`. `freezes`:
    a trace takes it without a word, and answers wrongly.
    """

    name: str
    pattern: str
    words: str
    edit: str
    code: str = ""
    seen: str = ""
    serious: bool = False
    freezes: bool = False
    rewrite: edits.Rewrite = edits.unknown

    def fits(self, text: str, code: str) -> bool:
        """Whether an error with this text at this line is of this kind."""
        return self.says(text) and bool(not self.code or re.search(self.code, code))

    def says(self, text: str) -> bool:
        """Whether the text alone speaks of this kind."""
        return bool(re.search(self.pattern, text, re.I))


_DEPENDENT = r"data-dependent|DataDependent|Could not guard on|specialized integer"
_SPECIALISED = r"specialized it to be a constant|Constraints violated|\bL\['|not all values of"
_NEVER = r"(?!)"  # no error tells of it: the source does

CONSTRUCTS = (
    Construct(
        "user-inserted graph break",
        r"graph_break\(\)",
        "the code asks torch.compile to break the graph here",
        "remove the call",
        rewrite=edits.removed,
    ),
    Construct(
        ".item()",
        rf"{_DEPENDENT}|Tensor\.item\(\)|aten\._local_scalar_dense|capture_scalar_outputs",
        "a number is taken out of a tensor, so the program would depend on the data: a graph holds no Python numbers",
        "keep it a tensor: drop .item(), and compare or multiply tensors; a loop that runs as often as the data says "
        "needs a fixed number of rounds with torch.where, or stays outside of the model",
        code=r"\.item\(|\.tolist\(|\bint\(|\bfloat\(|\bbool\(",
        seen="takes a number out of a tensor: a trace freezes it",
        serious=True,
        freezes=True,
        rewrite=edits.no_item,
    ),
    Construct(
        "loop as long as the data says",
        rf"{_DEPENDENT}|generic_jump|dynamic control flow",
        "how often the loop runs is only known when the model runs",
        "a fixed number of rounds with torch.where inside; torch.while_loop; or keep the loop outside of the model",
        code=r"\bfor\b.*\brange\(|\bwhile\b",
        seen="values of a tensor end the loop: a trace freezes the rounds of the example",
        serious=True,
        freezes=True,
    ),
    Construct(
        "data-dependent if",
        rf"{_DEPENDENT}|branching|generic_jump|dynamic control flow",
        "which branch runs depends on values in a tensor: a graph has no Python branches",
        "compute both branches and choose with torch.where(condition, a, b); use torch.cond when they are costly; "
        "or move the decision out of the model",
        code=r"\b(if|elif)\b",
        seen="branches on values of a tensor: a trace freezes the branch that the example took",
        serious=True,
        freezes=True,
        rewrite=edits.branch,
    ),
    Construct(
        "assertion on values",
        rf"{_DEPENDENT}|generic_jump|branching",
        "the assertion needs a value that is only known when the model runs",
        "check in front of the model, or leave the line out of what is shipped",
        code=r"^assert\b",
        seen="asserts on values of a tensor",
        rewrite=edits.removed,
    ),
    Construct(
        "output length depends on data",
        rf"nonzero|masked_select|unique|Dynamic shape operator|{_DEPENDENT}",
        "how many values come out depends on the data (boolean mask, nonzero, unique)",
        "keep the shape and zero the rest: torch.where(mask, x, 0); or return the mask and select after the model",
        code=r"\[[^\]]*(>|<|==|mask|keep|index|~)|nonzero|masked_select|unique|len\(|\bnms\(|where\([^,]*\)",
        seen="picks by a mask: the output's length depends on the data",
    ),
    Construct(
        "mask whose values are looked at",
        rf"{_DEPENDENT}|Tensor\.item\(\)",
        "nn.Transformer compares a mask with the causal one to choose its kernel, unless it is told",
        "say so: tgt_is_causal=True (src_is_causal, is_causal), or False",
        code=r"\(.*\b\w*mask\s*=(?!=)",
    ),
    Construct(
        "data-dependent value",
        _DEPENDENT,
        "Python needs a value that is only known when the model runs",
        "keep it a tensor, or compute it before the model and pass it in",
    ),
    Construct(
        "numpy inside the model",
        r"\.numpy\(\)|numpy|import statements aren't supported",
        "the data leaves torch here: exporters see a constant, or nothing",
        "use the torch function of the same name (np.percentile is torch.quantile, np.argsort is torch.argsort)",
        code=r"numpy|np\.",
        seen="leaves torch: exporters see a constant here",
        freezes=True,
    ),
    Construct(
        "print or logging",
        r"builtin operator.?.?print|builtin `print`|logging",
        "printing is a side effect: it breaks the graph, or is lost in the exported program",
        "remove it, or print outside of forward",
        seen="prints: breaks the graph of torch.compile",
        rewrite=edits.removed,
    ),
    Construct(
        "loop over a free axis",
        _SPECIALISED,
        "the loop runs once for each step of a free axis: the program would hold as many copies of it as the example "
        "has steps",
        "a layer that takes the whole axis at once (nn.GRU for nn.GRUCell, cumsum, a batched product); or fix the axis",
        code=r"\bfor\b.*\bin\b",
        seen="runs once for each step of an axis: a program holds a copy for each step",
        freezes=True,
    ),
    Construct(
        "size written into the code",
        rf"{_SPECIALISED}|shape .* is invalid for input|invalid dimensions for input",
        "a free axis takes a fixed length here, or a branch asks for its length",
        "use -1 or x.shape[0] instead of the number; or declare the axis with the lengths that the code allows",
        seen="a length of a tensor is written into the code, or decides a branch",
        freezes=True,
        rewrite=edits.no_size,
    ),
    Construct(
        "in-place write on a view",
        r"in-?place operation|is a view|mutat|a leaf Variable|inplace update",
        "a view is written in place: the exporter cannot tell what else sees the change",
        "write out of place: x = x + 1 instead of x.add_(1); torch.cat or torch.where instead of x[:, 0] = ...",
        rewrite=edits.out_of_place,
    ),
    Construct(
        "custom autograd Function",
        r"autograd\.Function|autograd_function|FunctionMeta|Python builtin <.*apply",
        "a torch.autograd.Function is Python code that this route cannot read",
        "in eval mode call its forward as plain torch operations; a custom operator goes through torch.library",
    ),
    Construct(
        "custom operator without a fake",
        r"register_fake|fake impl|abstract impl|meta implementation",
        "exporters run a custom operator on tensors without values, and it does not say what comes out then",
        'beside the operator: @torch.library.register_fake("namespace::name") over a function of the same arguments '
        "that returns empty tensors of the right shape and dtype, such as torch.empty_like(x)",
    ),
    Construct(
        "operator that ONNX does not have",
        r"No ONNX function found|Unsupported: ONNX export|exporting the operator|No decompositions registered",
        "ONNX has no operator for this call",
        "write it with basic operators; or use a backend that takes no ONNX (inductor, aoti, torchscript)",
    ),
    Construct(
        "tensor on another device",
        r"tensors to be on the same device|FakeTensor Device Propagation|two different devices",
        "a tensor that forward makes lies on the processor, while weights and inputs are on the GPU",
        "make it where the input is: torch.full(..., device=x.device); or make it once, with self.register_buffer",
    ),
    Construct(
        "dtype mismatch",
        r"same dtype|expected scalar type|but found Double|dtype mismatch|float != double",
        "two tensors of different number formats meet",
        "bring the module to one format with module.float(), or cast one side: x.to(self.weight.dtype)",
    ),
    Construct(
        "side effect in Python",
        r"side effect|mutating|list .*append|attribute mutation|leaked|constant_attribute|assigned during",
        "forward changes a Python object: an exported program forgets that",
        "return the value instead, or keep it in a buffer with register_buffer",
        seen="changes a Python object in forward: exported programs forget that",
        serious=True,
        freezes=True,
    ),
    Construct(
        "dict output",
        r"Encountering a dict|Tracer cannot infer type|Only tensors, lists, tuples",
        "this route only knows tensors, lists and tuples",
        "return a tuple or a NamedTuple; the other routes take dicts",
    ),
    Construct(
        "Python that TorchScript cannot read",
        r"NotSupportedError|UnsupportedNodeError|FrontendError|aren't supported|expected type comment|"
        r"Could not get name of python class|cannot be compiled|Unknown type|Python type|has no attribute|"
        r"Expected a default value of type|Arguments for call are not valid|source for|undefined value|Python value of|"
        r"single top-level function|packs the outputs another way",
        "TorchScript reads a small part of Python only",
        "no need to mend it where export, ONNX or torch.compile takes the module; TorchScript is on its way out",
    ),
    Construct(
        "shapes do not fit",
        r"same reduction dim|mat1 and mat2|size of tensor|shapes cannot be multiplied|must match the size",
        "two tensors do not fit for some length of a free axis",
        "check the axes that were declared free, or narrow their range: rows:2..16",
    ),
    Construct(
        "packed sequence",
        r"argument 'size' failed to unpack|marked as skipped|pack_padded",
        "packing reads the lengths out of a tensor, and a graph holds no Python numbers",
        "leave the packing out, and mask what lies behind each row's length; TorchScript takes it as it is",
        code=r"pack_padded_sequence|pack_sequence",
        freezes=True,
    ),
    Construct(
        "recurrent layer over a free axis",
        rf"{_SPECIALISED}|invalid dimensions for input|wrap RNN",
        "torch's exporters unroll nn.LSTM, nn.GRU and nn.RNN step by step, for the example's length only",
        "no need to mend it: TorchScript takes it with its loop, and torchship hands that to the other engines; or fix "
        "the axis, and pad",
        code=r"(?!)",  # a call of a module: only the module itself says what it is
        freezes=True,
    ),
    Construct(
        "random numbers",
        _NEVER,
        "every run draws other numbers, and another runtime draws them its own way",
        "pass the noise in as an input, or leave it out when not self.training",
        seen="draws random numbers in forward",
        freezes=True,
    ),
    Construct(
        "dropout that eval() cannot switch off",
        _NEVER,
        "F.dropout drops values unless it is told not to, in eval mode too",
        "F.dropout(x, p, training=self.training), or an nn.Dropout",
        seen="F.dropout without training=self.training stays on in eval mode",
        serious=True,
        freezes=True,
    ),
    Construct(
        "batch norm that eval() cannot switch off",
        _NEVER,
        "F.batch_norm with training=True takes mean and variance from the batch: rows change one another",
        "training=self.training, or an nn.BatchNorm",
        seen="F.batch_norm with training=True takes its statistics from the batch",
        serious=True,
        freezes=True,
    ),
    Construct(
        "try and except",
        _NEVER,
        "one way is taken while a program is exported, and the other is forgotten",
        "choose in front of the model",
        seen="try and except around tensor code: exporters keep one way only",
    ),
    Construct(
        "package missing",
        r"ModuleNotFoundError|No module named|onnxscript",
        "this route needs a package that is not installed",
        "pip install 'torchship[optimize]'",
    ),
    Construct(
        "graph break",
        r"Unsupported|graph break|Dynamo does not (know|support)|skipped|fullgraph",
        "torch.compile cannot follow this line, and would run it in Python",
        "rewrite the line with torch operations, or move it out of forward",
    ),
)

UNKNOWN = Construct(
    "unknown",
    "",
    "this route refuses the module",
    "read its own message; the other routes may take the module as it is",
)


def recognise(text: str, code: str) -> Construct:
    """The first construct whose marks are in the error's text and in the user's line."""
    return next((construct for construct in CONSTRUCTS if construct.fits(text, code)), UNKNOWN)


def named(name: str) -> Construct | None:
    """The construct of a name; None where it is only known as a finding."""
    return next((construct for construct in CONSTRUCTS if construct.name == name), None)
