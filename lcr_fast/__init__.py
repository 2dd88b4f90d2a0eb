"""lcr_fast: latent cross reasoning for search-aware recommendation (LCR-SER), fast."""
