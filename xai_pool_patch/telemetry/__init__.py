"""What the package reports: log records, statistics, OpenTelemetry metrics.

A pool reports each event with one call of `pool_metrics`, which passes it on to `log`, `usage` and
`instruments`. `log` and `usage` are quick to import; `instruments` imports OpenTelemetry.

The modules import only the root leaves. Messages, levels, field names, statistics keys and metric
names are public: applications rely on them, so a change of one needs a line in the changelog.
"""
