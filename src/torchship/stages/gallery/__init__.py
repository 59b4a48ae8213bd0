"""The gallery of known faces: a durable vector index, and the stages that match and enrol with it."""

from torchship.stages.gallery.finder import Match as Match
from torchship.stages.gallery.gallery import Enrolment as Enrolment
from torchship.stages.gallery.gallery import Gallery as Gallery
from torchship.stages.gallery.gallery import Person as Person
