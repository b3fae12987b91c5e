"""Plots and HTML pages that show what a run may show: public or differentially private numbers."""
