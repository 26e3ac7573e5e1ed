"""What the package reports: log records, statistics, Prometheus metrics.

A pool reports each event with one call of `pool_metrics`, which passes it on to `log`, `usage` and
`metrics`. `log` and `usage` are quick to import; `metrics` imports prometheus_client, which
livekit-agents has imported by then.

The modules import only the root leaves. Messages, levels, field names, statistics keys and metric
names are public: applications rely on them, so a change of one needs a line in the changelog.
"""
