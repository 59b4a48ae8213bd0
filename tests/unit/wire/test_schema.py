"""The schema that the server loads is the one in the proto folder, and agrees with Triton's, number by number.

To make it again after a change, in src/torchship/wire/proto:
python -m grpc_tools.protoc -I. --descriptor_set_out=../oip.binpb oip.proto health.proto reflection_v1.proto \
    reflection_v1alpha.proto
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2
from tritonclient.grpc import model_config_pb2, service_pb2

from torchship.wire import schema

WIRE = Path(schema.__file__).parent
OURS_ALONE = {"ModelMetadataResponse.properties"}  # of the Open Inference Protocol, which Triton's lacks


def test_the_compiled_schema_is_up_to_date(tmp_path: Path) -> None:
    made = tmp_path / "oip.binpb"
    names = ["oip.proto", "health.proto", "reflection_v1.proto", "reflection_v1alpha.proto"]
    words = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={made}", *names]
    subprocess.run(words, cwd=WIRE / "proto", check=True, timeout=60)
    read = descriptor_pb2.FileDescriptorSet.FromString
    assert read(made.read_bytes()) == read((WIRE / "oip.binpb").read_bytes())


def fields(found: Any, prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """Number, type and repetition of every field below a message descriptor."""
    name = f"{prefix}{found.name}"
    told: dict[str, tuple[Any, ...]] = {}
    for field in found.fields:
        kind = (
            field.message_type.name if field.message_type else field.enum_type.name if field.enum_type else field.type
        )
        told[f"{name}.{field.name}"] = (field.number, kind, field.is_repeated)
    for inner in found.nested_types:
        told |= fields(inner, f"{name}.")
    return told


def test_every_field_is_tritons() -> None:
    theirs: dict[str, tuple[Any, ...]] = {}
    for file in (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR):
        for found in file.message_types_by_name.values():
            theirs |= fields(found)
    ours: dict[str, tuple[Any, ...]] = {}
    (file,) = [one for one in schema.descriptors().file if one.package == "inference"]
    for one in file.message_type:
        ours |= fields(schema.message(f"inference.{one.name}").DESCRIPTOR)
    mine = {name: about for name, about in ours.items() if not name.startswith(tuple(OURS_ALONE))}
    mine = {name: about for name, about in mine.items() if "PropertiesEntry" not in name}
    assert {name: theirs.get(name) for name in mine} == mine
    missing = {name for name in theirs if name.startswith(("ModelInfer", "Infer", "Server", "Repository", "System"))}
    assert missing <= ours.keys()


def test_every_method_is_tritons() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    ours = schema.methods()
    for method in theirs:
        mine = ours[f"/inference.GRPCInferenceService/{method.name}"]
        assert mine.request.DESCRIPTOR.name == method.input_type.name
        assert mine.response.DESCRIPTOR.name == method.output_type.name
        assert (mine.client_streams, mine.server_streams) == (method.client_streaming, method.server_streaming)
