"""One run from settings to adapter: settings, job, plan, train, score, allocate, predict, record."""
