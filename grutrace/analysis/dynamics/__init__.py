"""The GRU as a dynamical system: Jacobians, Lyapunov exponents, fixed points."""
