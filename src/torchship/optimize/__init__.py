"""The optimizing half: capture a module, try recipes, guard and measure them, choose, report."""

from torchship.plugins import make_callable

make_callable(__name__, verb="torchship.optimize.search:optimize")
