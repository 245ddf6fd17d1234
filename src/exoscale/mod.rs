//! exoscale.
