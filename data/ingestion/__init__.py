"""Raw data sets of others, turned into verified ones of ours."""
