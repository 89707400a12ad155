"""All file families of the mutant campaign."""

from tools.campaign import data_families, model_families, photo_families
from tools.campaign.family import Family

FAMILIES: tuple[Family, ...] = (*photo_families.FAMILIES, *model_families.FAMILIES, *data_families.FAMILIES)
