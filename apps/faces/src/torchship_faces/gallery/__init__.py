"""The gallery of known faces: a durable vector index, and the stages that match and enrol with it."""

from torchship_faces.gallery.finder import Hit as Hit
from torchship_faces.gallery.gallery import Enrolment as Enrolment
from torchship_faces.gallery.gallery import Gallery as Gallery
from torchship_faces.gallery.matching import Enrol as Enrol
from torchship_faces.gallery.matching import Forget as Forget
from torchship_faces.gallery.matching import Match as Match
from torchship_faces.gallery.matching import Merge as Merge
from torchship_faces.gallery.state import Person as Person
