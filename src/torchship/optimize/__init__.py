"""The workshop: capture a module, try recipes, guard and measure them, choose, report."""
