"""Face recognition as stages: Open -> detector -> Find -> Align -> embedder -> gallery Match -> answer."""

from torchship.stages.faces.stages import Align as Align
from torchship.stages.faces.stages import Find as Find
from torchship.stages.faces.stages import Open as Open
from torchship.stages.faces.stages import answer as answer
