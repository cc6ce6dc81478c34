"""One file for each trainer: it trains, resumes, evaluates the average and exports it."""
