"""Symmetric matrices with a prescribed spectrum."""

import numpy as np


def with_spectrum(values, seed=0):
    """Return Q diag(values) Q^T in float64, Q Haar distributed."""
    values = np.asarray(values, np.float64)
    normal = np.random.default_rng(seed).standard_normal((values.size, values.size))
    q, r = np.linalg.qr(normal)
    q = q * np.sign(np.diag(r))
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def wanted(values, k, which):
    """Return the k eigenvalues that eigsh should find, in its order."""
    values = np.asarray(values)
    rank = {"LM": np.abs(values), "LA": values, "SA": -values}[which]
    return values[np.argsort(-rank)][:k]
