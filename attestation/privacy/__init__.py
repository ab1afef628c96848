"""Openings of commitments: kept, sealed, handed on in part, erased."""
