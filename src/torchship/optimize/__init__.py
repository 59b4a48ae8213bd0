"""The workshop: capture a module, try recipes, guard and measure them, choose, report."""

from torchship.face import make_callable

make_callable(__name__, verb="torchship.optimize.search:optimize")
