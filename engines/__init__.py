"""Serving engines: what is only an engine's own, one package each, behind `base.EngineSpec`."""
