"""From a backbone and some images to a head, in any number of processes. The door is `fit`."""

from ..compat import need

need("datasets", "A fit", "fit")
