"""Speed, memory and energy: subjects timed in processes of their own, MLPerf's scenarios."""
