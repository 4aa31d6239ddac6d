"""Training: one resumable run over the whole schedule, its metrics and its report."""
