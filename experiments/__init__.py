"""One short script per claim of the essay, and the pages that stand in results/."""
