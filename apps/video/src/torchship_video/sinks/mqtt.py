"""MQTT 3.1.1: observations published to a broker, by PyPI `paho-mqtt` (`pip install 'torchship-video[mqtt]'`).

An observation counts as written once the broker has it (QoS 1 and 2: acknowledged). While the broker is away this
process starts again and again with longer and longer pauses, and the sink's queue keeps what is new.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadConfig, Unavailable
from torchship_video.messages import Observation
from torchship_video.sinks import Opening, record

PIXELS, AGAIN = False, True


class MqttOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The broker at `host` and `port`; `tls` with the system's authorities, or with those of the file `ca`.

    `{camera}` in `topic` is the camera's name. Observations with events are published, with `every` all. `password`
    may be `env:NAME`, to take it from the environment. The broker has `timeout` seconds to connect and to acknowledge.
    """

    host: str = "127.0.0.1"
    port: int = 0
    topic: str = "torchship/{camera}"
    every: bool = False
    qos: Literal[0, 1, 2] = 1
    retain: bool = False
    username: str = ""
    password: str = ""
    client: str = ""
    tls: bool = False
    ca: str = ""
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if not self.host or not 0 <= self.port <= 65535 or not 0 < self.timeout <= 300:
            raise BadConfig("sink mqtt: it needs a host, a port up to 65535, a timeout above 0 and at most 300 s")
        if not self.topic or any(character in self.topic for character in "+#\0"):
            raise BadConfig(f"sink mqtt: topic is {self.topic!r}", hint="no wildcards: torchship/{camera}")
        if self.password.startswith("env:") and self.password[4:] not in os.environ:
            raise BadConfig(f"sink mqtt: password: the environment has no {self.password[4:]!r}", hint="export it")


class Mqtt:
    """A connection to a broker."""

    def __init__(self, options: MqttOptions, _opening: Opening) -> None:
        try:
            from paho.mqtt import client as paho
            from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
        except ImportError:
            raise Unavailable("paho-mqtt is not installed", hint="pip install 'torchship-video[mqtt]'") from None
        self._options = options
        self._answered, self._fault = threading.Event(), ""
        version = CallbackAPIVersion.VERSION2
        client = paho.Client(version, client_id=options.client, protocol=MQTTProtocolVersion.MQTTv311)
        if options.username:
            secret = options.password
            client.username_pw_set(options.username, os.environ[secret[4:]] if secret.startswith("env:") else secret)
        if options.tls or options.ca:
            client.tls_set(ca_certs=options.ca or None)
        client.connect_timeout = options.timeout
        client.on_connect = self._connected
        self._client: Any = client
        where = f"the broker {options.host}:{self._port}"
        try:
            client.connect(options.host, self._port)
        except OSError as fault:
            raise Unavailable(f"{where} cannot be reached: {fault}", hint="is it running?") from None
        client.loop_start()
        if not self._answered.wait(options.timeout) or self._fault:
            raise Unavailable(f"{where}: {self._fault or 'no answer'}", hint="check username, password and tls")

    @property
    def _port(self) -> int:
        return self._options.port or (8883 if self._options.tls or self._options.ca else 1883)

    def _connected(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._fault = str(reason) if reason.is_failure else ""
        self._answered.set()

    def write(self, observation: Observation, _pixels: NDArray[np.uint8] | None) -> None:
        """Publish one observation, if something happened in it. Raises Unavailable when the broker does not take it."""
        if not (observation.events or self._options.every):
            return
        camera = "".join("_" if character in "+#/\0" else character for character in observation.frame.camera)
        topic = self._options.topic.replace("{camera}", camera)
        body = msgspec.json.encode(record(observation))
        sent = self._client.publish(topic, body, qos=self._options.qos, retain=self._options.retain)
        try:
            sent.wait_for_publish(self._options.timeout)
        except (ValueError, RuntimeError) as fault:
            raise Unavailable(f"the broker does not take messages: {fault}") from None
        if not sent.is_published():
            raise Unavailable(f"the broker did not acknowledge within {self._options.timeout:.0f} s")

    def facts(self) -> dict[str, int]:
        """Whether it is connected."""
        return {"connected": int(self._client.is_connected())}

    def close(self) -> None:
        """Leave the broker."""
        self._client.disconnect()
        self._client.loop_stop()


OPTIONS, SINK = MqttOptions, Mqtt
