"""Runs models: sessions, pushes, versions, quotas. Knows neither gRPC nor protobuf."""
