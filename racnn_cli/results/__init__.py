"""Predictions, drawings, tables and the report page of a run."""
