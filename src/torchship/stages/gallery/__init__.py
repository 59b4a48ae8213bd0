"""The gallery of known faces: a durable vector index, and the stages that match and enrol with it."""

from torchship.stages.gallery.finder import Hit as Hit
from torchship.stages.gallery.gallery import Enrolment as Enrolment
from torchship.stages.gallery.gallery import Gallery as Gallery
from torchship.stages.gallery.stages import Enrol as Enrol
from torchship.stages.gallery.stages import Forget as Forget
from torchship.stages.gallery.stages import Match as Match
from torchship.stages.gallery.stages import Merge as Merge
from torchship.stages.gallery.state import Person as Person
