"""The drop-in certificate: does a model do the same with torch_bp's modules and optimizers as with torch's?"""

from torch_bp.certificate.report import Certificate, Row
from torch_bp.certificate.verify import verify

__all__ = ["Certificate", "Row", "verify"]
