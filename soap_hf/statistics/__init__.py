"""The mathematics of SOAP on tensors: components, scores, synthetic images. The door is `soap_statistics`."""

NEGLIGIBLE_WEIGHT = 1e-4
"""Components with a weight up to this are neither stored nor removed."""
