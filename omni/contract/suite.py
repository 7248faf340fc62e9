"""All checks, in the order in which they are run."""

from omni.contract import bundle, doors, encoder, fused

CHECKS = (*bundle.CHECKS, *encoder.CHECKS, *fused.CHECKS, *doors.CHECKS)
