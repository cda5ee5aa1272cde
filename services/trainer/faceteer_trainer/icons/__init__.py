"""Pictures of what turning a feature up causes."""
