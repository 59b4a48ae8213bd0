"""The server's configuration: one TOML file, read into frozen structs; every error starts with its path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from torchship import home, textfiles
from torchship.errors import BadConfig
from torchship.pipeline.config import PipelineConfig, StageConfig
from torchship.serve.engine.spec import LineLimits
from torchship.serve.http.site import CallerLimits
from torchship.stage import Value

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z][A-Za-z0-9_.\-]{0,127}$")]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
_LOOPBACK = "127.0.0.1"


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[tls]`: PEM files, relative to the file; `clients` holds the authorities whose client certificates are asked for
    (mTLS)."""

    certificate: str
    key: str
    clients: str = ""


class Http(CallerLimits, frozen=True, forbid_unknown_fields=True):
    """`[http]`: where REST listens (gRPC too, over HTTP/2), and its CallerLimits; port 0 takes a free one.

    A `shared` port is listened on by several servers of one user, among whom the kernel deals out connections; at its
    `own_port` each of them can be asked alone. `receivers` are processes that run the connections instead of the host:
    by default there are some where a model runs on a card. A server that is told to stop is not ready, but takes
    requests, for `drain_delay` seconds.
    """

    host: str = _LOOPBACK
    port: Port = 8000
    forward_headers: str = ""
    shared: bool = False
    own_port: Port | None = None
    receivers: Annotated[int, msgspec.Meta(ge=0, le=64)] | None = None
    cors_origins: tuple[str, ...] = ()
    drain_delay: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Grpc(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[grpc]`: a port for gRPC alone; without a host, that of REST."""

    port: Port
    host: str = ""


class StorePlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[store]`: where artifacts are; empty is the user's own store. Relative to the file. `watch`: look for new
    versions every so many seconds; 0: never."""

    root: str = ""
    watch: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Logs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[log]`: how much is logged, and whether for readers or as JSON lines."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class TraceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[trace]`: where OpenTelemetry spans go (OTLP over HTTP), and the share of requests without a trace of their own
    that get one. Needs the extra `otel`."""

    endpoint: str = "http://127.0.0.1:4318/v1/traces"
    sample: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    service: str = "torchship"


class Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[control]`: what callers may do beyond inference; all off unless said."""

    repository: bool = False
    shared_memory: bool = False
    trace_folder: str = ""


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[token]]`: who may do what. `hash` is `sha256:` and 64 hex digits; `torchship serve --new-token` makes one."""

    name: Name
    hash: Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
    scopes: tuple[Literal["infer", "manage", "metrics"], ...] = ("infer",)


class Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[mount]]`: a function `module:name` that is called with the service and `options` and returns more routes."""

    run: str
    options: dict[str, Any] = {}


class Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which versions of its artifact a model serves: the `latest` N, those that are `listed`, or `all` of them.

    By default the one that `artifact` names. `weights` sends requests that name no version to versions by their
    share (a canary); `shadow` is a version that gets a copy of every such request, and whose answers nobody sees.
    """

    latest: Annotated[int, msgspec.Meta(ge=0)] = 0
    listed: tuple[int, ...] = ()
    all: bool = False
    weights: dict[str, Annotated[float, msgspec.Meta(ge=0)]] = {}
    shadow: str = ""


class ModelConfig(LineLimits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[model]]`: exactly one of `stages`, `artifact` and `run`, and its LineLimits. 0 copies: what the stages say.

    `latency_target` bounds the batch by what was measured when the artifact was made. `labels` name the classes for
    callers who ask for classes: a list, a file, or `imagenet`.
    """

    name: Name
    stages: tuple[StageConfig, ...] = ()
    artifact: str = ""
    run: str = ""
    options: dict[str, Any] = {}
    parameters: dict[str, Value] = {}
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    copies: Annotated[int, msgspec.Meta(ge=0)] = 0
    device: str | tuple[str, ...] = "cpu"
    memory_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    threads: int = 0
    max_batch: Annotated[int, msgspec.Meta(ge=0)] = 0
    trust: bool = False
    versions: Versions = Versions()
    latency_target: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    labels: str | tuple[str, ...] = ()

    def pipeline(self) -> PipelineConfig:
        """The model as a pipeline: `artifact` and `run` are a single stage."""
        shared = ("run", "artifact", "options", "device", "memory_share", "threads", "max_batch", "trust")
        stages = self.stages or (StageConfig(**{name: getattr(self, name) for name in shared}),)
        if self.copies:
            stages = tuple(msgspec.structs.replace(stage, copies=self.copies) for stage in stages)
        return PipelineConfig(self.name, stages, self.inputs, self.outputs, self.parameters)

    def limits(self) -> LineLimits:
        """What its line takes."""
        return msgspec.convert(self, LineLimits, from_attributes=True)


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. `name` is what callers are told: clients made for Triton insist on `triton`.

    `one_process`: models run in threads of the host, which saves an interpreter and its libraries for each; a model
    that crashes then ends the server, and one that hangs cannot be ended.
    """

    name: str = "triton"
    one_process: bool = False
    http: Http = Http()
    grpc: Grpc | None = None
    tls: Tls | None = None
    store: StorePlace = StorePlace()
    log: Logs = Logs()
    trace: TraceConfig | None = None
    control: Control = Control()
    token: tuple[Token, ...] = ()
    mount: tuple[Mount, ...] = ()
    model: tuple[ModelConfig, ...] = ()


def convert(data: object) -> ServerConfig:
    """Plain data as a ServerConfig. Raises BadConfig whose message starts with the path of the fault."""
    try:
        config = msgspec.convert(data, ServerConfig)
    except msgspec.ValidationError as fault:
        message, _, path = str(fault).partition(" - at `")
        raise BadConfig(f"{path.rstrip('`') or '$'}: {message}", hint="see docs/serve.md") from None
    names: set[str] = set()
    for index, model in enumerate(config.model):
        path = f"$.model[{index}]"
        said = [kind for kind in ("stages", "artifact", "run") if getattr(model, kind)]
        if len(said) != 1:
            raise BadConfig(
                f"{path}: has {' and '.join(said) or 'nothing to run'}",
                hint="give exactly one of stages, artifact, run",
            )
        if model.name == "stats":
            raise BadConfig(f"{path}.name: /v2/models/stats is the statistics of all", hint="take another name")
        if model.name in names:
            raise BadConfig(f"{path}.name: {model.name!r} is taken", hint="each model needs a name of its own")
        if model.stages and (model.options or model.max_batch or model.threads or model.memory_share):
            raise BadConfig(
                f"{path}: options, max_batch, threads and memory_share belong to a stage", hint="write them into it"
            )
        names.add(model.name)
    claimed_shares(config.model)
    return config


def claimed_shares(models: Iterable[ModelConfig]) -> dict[str, float]:
    """What models claim of the memory of each card, of 1: each copy of a stage its `memory_share`, in each version.

    A device that is not named is the first card: an artifact may choose one itself. Raises BadConfig with names and
    numbers where it is more than there is.
    """
    claims: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for model in models:
        versions = max(1, model.versions.latest, len(model.versions.listed))
        for stage in model.pipeline().stages:
            for device in stage.devices if stage.memory_share else ():
                claims[card_of(device)][model.name] += [stage.memory_share] * versions
    found = {}
    for card, named in claims.items():
        total = found[card] = sum(share for shares in named.values() for share in shares)
        if total > 1 + 1e-6:
            parts = ", ".join(f"{name} {' + '.join(f'{one:g}' for one in shares)}" for name, shares in named.items())
            raise BadConfig(
                f"the memory shares of {card} add up to {total:.2f}, more than all of it: {parts}",
                hint="lower memory_share or copies; each copy, stage and version counts",
            )
    return found


def card_of(device: str) -> str:
    """The card that a device means, as `cuda:0`: the first where none is named."""
    return "cuda:0" if device in ("cpu", "cuda") else device


def read(path: Path | str) -> ServerConfig:
    """The configuration in a TOML file; store and certificates are found from the file. Raises NotFound, BadConfig."""
    path = home.expand(path)
    data = textfiles.read_toml(path)
    try:
        config = convert(data)
    except BadConfig as fault:
        raise BadConfig(f"{path}: {fault}", hint=fault.hint) from None
    change, near = msgspec.structs.replace, path.parent
    tls = config.tls
    if tls is not None:
        tls = Tls(_beside(near, tls.certificate), _beside(near, tls.key), _beside(near, tls.clients))
    return change(config, store=change(config.store, root=_beside(near, config.store.root)), tls=tls)


def _beside(folder: Path, name: str) -> str:
    """A path in the file, found from the file; empty stays empty."""
    return str((folder / home.expand(name)).resolve()) if name else ""
