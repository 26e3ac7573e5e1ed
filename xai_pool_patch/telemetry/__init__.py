"""What the pool tells about itself: log records, statistics, OpenTelemetry metrics.

`metrics` is what a pool tells everything to, in one call an event; the other modules are where
that goes. `log` and `stats` import nothing that takes long, `metrics` imports OpenTelemetry.
"""
