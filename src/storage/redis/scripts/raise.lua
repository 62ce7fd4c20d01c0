-- Sees to it that all fencing tokens from now on are above ARGV[2], if the lock KEYS[1] has the token
-- ARGV[1]. KEYS[3] is the fencing counter. Answers 1 if so, 0 if the lock has another token or none.
local owner = redis.call('GET', KEYS[1])
if owner ~= ARGV[1] and owner ~= ARGV[1] .. '!' then return 0 end
if tonumber(redis.call('GET', KEYS[3]) or 0) < tonumber(ARGV[2]) then
  redis.call('SET', KEYS[3], ARGV[2])
end
return 1
