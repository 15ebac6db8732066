"""A head on a tiny backbone, whose features are extracted."""

import pytest

from soap_hf import SOAPModelWrapper


@pytest.fixture
def model(vit, projection, processor):
    return SOAPModelWrapper.from_backbone(vit, projection, image_processor=processor)
