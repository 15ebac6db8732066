"""The mathematics of SOAP on tensors: components, scores, synthetic images. The door is `soap_statistics`."""
