"""GaLore (arXiv 2403.03507): Adam on projections of gradients, over whichever spans a rank holds."""
