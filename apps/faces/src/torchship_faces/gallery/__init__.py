"""The gallery of known faces: a durable vector index, and the stages that match and enrol with it."""

from torchship_faces.gallery.finder import Hit as Hit
from torchship_faces.gallery.gallery import Enrolment as Enrolment
from torchship_faces.gallery.gallery import Gallery as Gallery
from torchship_faces.gallery.stages import Enrol as Enrol
from torchship_faces.gallery.stages import Forget as Forget
from torchship_faces.gallery.stages import Match as Match
from torchship_faces.gallery.stages import Merge as Merge
from torchship_faces.gallery.state import Person as Person
