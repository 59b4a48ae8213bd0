"""The serving half: artifacts and pipelines served on lines of worker processes."""

from torchship.plugins import make_callable

make_callable(__name__, verb="torchship.serve.host:serve")
