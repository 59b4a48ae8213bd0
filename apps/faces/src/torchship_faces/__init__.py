"""Face recognition as stages: Open -> detector -> Find -> Align -> embedder -> gallery Match -> answer."""

from torchship_faces.stages import Align as Align
from torchship_faces.stages import Find as Find
from torchship_faces.stages import Open as Open
from torchship_faces.stages import answer as answer
